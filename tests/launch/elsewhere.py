"""A run folder at a hub of real sockets, and what ranks of nodes that do not see its disk use to reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright.launch import Context
from meshwright.launch.hub_disk import HubDisk
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.messages import RankPlace
from meshwright.run import RunFolder


class Elsewhere:
    """`run` is the run folder at the driver; `begin` starts a generation without ranks."""

    def __init__(self, files: HubFiles, run: RunFolder) -> None:
        self.files, self.run = files, run

    def begin(self) -> int:
        """Grants the next lease, as `train` does, and begins its generation; returns its number."""
        number = self.run.grant_lease()
        self.files.begin(number, [], [], self.run.logs)
        return number

    def context(self, copies: Path, rank: int = 0, world: int = 1) -> Context:
        """That of a rank of this generation on a node that keeps its copies in `copies`."""
        generation = self.files.hub.generation
        dial, folder = self.files.local, self.run.logs
        return Context(RankPlace("rank", rank, world, 0, 0, generation, folder, dial, f"node-{rank}", str(copies)))

    def disk(self) -> HubDisk:
        """The driver's disk, for a rank of this generation."""
        disk = self.context(Path("/nowhere")).hub_disk(self.run.path)
        assert disk is not None
        return disk


@contextmanager
def elsewhere(folder: Path) -> Iterator[Elsewhere]:
    """A run in `folder`, whose hub has begun a generation."""
    run = RunFolder(folder.resolve()).create()
    files = HubFiles(run.hub, ())
    try:
        here = Elsewhere(files, run)
        here.begin()
        yield here
    finally:
        files.close()
