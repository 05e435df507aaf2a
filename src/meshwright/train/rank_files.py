"""The run folder for one rank: files to read, and the disk that its checkpoints go to.

Where the node sees the run folder's disk, both are the run folder itself. Elsewhere the first rank of the node copies
through the hub what ranks read, into a folder of the node's own, while its others wait; checkpoints are written through
the hub, to the driver's disk.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright import checkpoint, data
from meshwright.checkpoint.manifest import MANIFEST_CAP_BYTES, MANIFEST_NAME
from meshwright.disk import OWN_DISK, Disk
from meshwright.errors import InputError
from meshwright.launch import Context
from meshwright.run import RunFolder

if TYPE_CHECKING:
    from meshwright.launch.hub_disk import HubDisk


class RankFiles:
    """`run` is the run folder, or this node's copy of job, plan and data; `checkpoints` is where they lie on `disk`."""

    def __init__(self, run: RunFolder) -> None:
        """Those of a rank that sees the disk of `run`."""
        self.run, self.checkpoints = run, run.checkpoints
        self.disk: Disk = OWN_DISK

    def newest_checkpoint(self) -> Path | None:
        """The newest committed checkpoint, to read on this node; None if there is none. Raises as checkpoint.latest."""
        return checkpoint.latest(self.checkpoints)

    @contextmanager
    def located(self) -> Iterator[None]:
        """Adds the node to problems with files that it may lack."""
        yield


class CopiedFiles(RankFiles):
    """Those of a rank whose node does not see the disk of the run folder. Making one copies what ranks read."""

    def __init__(self, run: RunFolder, hub: HubDisk, copies: Path, context: Context) -> None:
        self._origin, self._hub, self._copies, self._node = run, hub, copies, context.node
        self._tell = context.tell
        self.run, self.checkpoints, self.disk = RunFolder(copies / "run"), run.checkpoints, hub
        with self._first_of_node(), self.located():
            self._bring(context.generation)

    def _bring(self, generation: int) -> None:
        """Copies job, plan and data, unless another rank of this node has."""
        mark = self._copies / "generation"
        if mark.exists() and mark.read_text() == str(generation):
            return
        begin, count = time.monotonic(), 0
        self.run.create()
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)  # of an earlier generation
        for path in (self._origin.job, self._origin.plan):
            count += self._hub.fetch(path, self.run.path / path.name)
        if not self._has_data():
            draft = self.run.path / ".manifest"
            for path in (draft, self.run.manifest):
                shutil.rmtree(path, ignore_errors=True)
            count += self._hub.fetch(self._origin.manifest, draft)
            data.check_manifest(draft)
            draft.rename(self.run.manifest)
        mark.write_text(str(generation))
        self._say("job, plan and data", count, begin)

    def _has_data(self) -> bool:
        """Whether the data has been copied for an earlier generation: within a run it does not change."""
        own = self.run.manifest / data.MANIFEST_NAME
        theirs = self._hub.read(self._origin.manifest / data.MANIFEST_NAME, MANIFEST_CAP_BYTES)
        return own.exists() and own.read_bytes() == theirs

    def newest_checkpoint(self) -> Path | None:
        folder = checkpoint.latest(self.checkpoints, self._hub)
        if folder is None:
            return None
        copy = self.run.checkpoints / folder.name
        with self._first_of_node():
            if not copy.exists():
                begin, draft = time.monotonic(), copy.with_name(f".{copy.name}")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                names = [*checkpoint.read_manifest(folder, self._hub).files, MANIFEST_NAME]
                for part in {Path(name).parent for name in names}:
                    (draft / part).mkdir(exist_ok=True)
                count = sum(self._hub.fetch(folder / name, draft / name) for name in names)
                draft.rename(copy)
                self._say(f"checkpoint {folder.name}", count, begin)
        return copy

    @contextmanager
    def _first_of_node(self) -> Iterator[None]:
        """One rank of this node at a time; the kernel lets the next in where it dies."""
        with open(self._copies / "one-at-a-time", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _say(self, what: str, count: int, begin: float) -> None:
        seconds = time.monotonic() - begin
        self._tell("event", {"kind": "copied", "node": self._node, "what": what, "bytes": count, "seconds": seconds})
        print(f"copied {what} from the driver: {count / 1e6:.3g} MB in {seconds:.2g} s", file=sys.stderr)

    @contextmanager
    def located(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            place = f"on node {self._node}, which does not see the run folder's disk"
            copy, origin = str(self.run.path), str(self._origin.path)
            problems = [replace(one, where=f"{place}: {one.where.replace(copy, origin)}") for one in error.problems]
            raise InputError(problems) from error


def files_of(context: Context, run: RunFolder) -> RankFiles:
    """The files of the rank that `context` is of. Raises InputError where a copy is damaged."""
    hub = context.hub_disk(run.path)
    if hub is None:
        return RankFiles(run)
    assert context.copies is not None
    return CopiedFiles(run, hub, context.copies, context)
