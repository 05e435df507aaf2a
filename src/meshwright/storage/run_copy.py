"""The copy of a run in a store: its data, and its newest checkpoints.

    run.json                    {"run", "owner", "process", "data"}: which run, who writes here, its data's digest
    data/<digest>/              the run's manifest/ folder
    checkpoints/step-N-<digest> each a checkpoint's folder

Folders are named by the digest of their manifest.json, and count once their list of objects is there. Whoever trains
the run takes it by writing `run.json`; one who finds another owner there stops, so two never mix their checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem, RunFailed
from meshwright.files import has_its_digest, parse_json, read_capped, read_object, sync_folder, write_atomic
from meshwright.run import RunFolder
from meshwright.storage import folders
from meshwright.storage.folders import StoredFolder
from meshwright.storage.store import open_store

logger = logging.getLogger("meshwright")

CHECKPOINTS, DATA, RUN_NAME = "checkpoints", "data", "run.json"
MANIFEST_NAME = "manifest.json"
_MANIFEST_BYTES = 256 << 20
_RUN_BYTES = 1 << 16
_DIGITS = 16  # of a digest, in a name


@dataclass(frozen=True)
class LocalCheckpoint:
    """A committed checkpoint of the run folder, by its manifest."""

    folder: Path
    step: int
    sequence: int
    digest: str
    paths: tuple[str, ...]
    meta: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name in a store."""
        return f"{CHECKPOINTS}/step-{self.step}-{self.digest[:_DIGITS]}"


class RunCopy:
    """A run's copy at `url`. `take` makes this process its owner, which all that writes needs."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self.owner = secrets.token_hex(8)

    def checkpoints(self) -> list[StoredFolder]:
        """The committed checkpoints, oldest first. Raises InputError where one that may be newer than these is damaged,
        naming the object and the newest that is whole."""
        sound, damaged, _ = self._committed()
        for one in damaged:
            if not one.about or not sound or _sequence(one) > _sequence(sound[-1]):
                assert one.fault is not None
                raise InputError(replace(one.fault, nearest=self._near(one, sound)))
        return sound

    def _committed(self) -> tuple[list[StoredFolder], list[StoredFolder], list[str]]:
        """The checkpoints that are whole, oldest first, those that are damaged, and the names of unfinished ones."""
        found, unfinished = folders.committed(self.store, CHECKPOINTS)
        for at, one in enumerate(found):
            if one.about and not all(type(one.about.get(key)) is int for key in ("step", "sequence")):
                fault = Problem(self.store.place(one.name), "is no checkpoint: its list has no step and sequence")
                found[at] = replace(one, about={}, fault=fault)
        sound = sorted((one for one in found if one.fault is None), key=_sequence)
        return sound, [one for one in found if one.fault is not None], unfinished

    def require_none(self) -> list[StoredFolder]:
        """No checkpoints. Raises InputError where there are some."""
        held = self.checkpoints()
        if held:
            near = "to resume it: --resume; or name another place with checkpoint.url"
            raise InputError(Problem(self.store.url, f"holds a run already, at step {held[-1].about['step']}", near))
        return held

    def take(self, folder: RunFolder, *, new: bool) -> None:
        """Makes this process the owner of the run in `folder`, whose data are indexed. Raises InputError where another
        run is there already, or where `new` and any is."""
        held = self.require_none() if new else self.checkpoints()
        run = self._require_same_run(self._read_run(), folder) if held else self.owner
        process = f"process {os.getpid()} on {socket.gethostname()}"
        record = {"run": run, "owner": self.owner, "process": process, "data": digest_of_data(folder.manifest)}
        write_atomic(folder.copy, json.dumps({"run": run}).encode())
        self.store.write(RUN_NAME, json.dumps(record).encode())

    def send_data(self, manifest: Path) -> None:
        """Sends the run's manifest/ folder, unless it is there."""
        name = f"{DATA}/{digest_of_data(manifest)[:_DIGITS]}"
        if name not in {one.name for one in folders.committed(self.store, DATA)[0] if one.fault is None}:
            paths = [path.relative_to(manifest).as_posix() for path in manifest.rglob("*") if path.is_file()]
            folders.send(self.store, name, manifest, paths, {}, self._require_ownership)

    def has(self, checkpoint: LocalCheckpoint) -> bool:
        """Whether all of a checkpoint is there."""
        name = checkpoint.name
        listed = self.store.entries(name)
        with_list = f"{name}/{folders.LIST_NAME}" in listed
        return with_list and folders.read_folder(self.store, name, listed).fault is None

    def send_checkpoint(self, checkpoint: LocalCheckpoint, keep: int) -> StoredFolder:
        """Sends a checkpoint, then deletes all but the `keep` newest, and what dead owners left."""
        about = {"step": checkpoint.step, "sequence": checkpoint.sequence}
        paths = (*checkpoint.paths, MANIFEST_NAME)
        sent = folders.send(self.store, checkpoint.name, checkpoint.folder, paths, about, self._require_ownership)
        try:
            self._require_ownership()  # again: another may have taken it just before the list was written
        except RunFailed:
            folders.remove(self.store, checkpoint.name)
            raise
        sound, _, unfinished = self._committed()
        for name in [*(one.name for one in sound[:-keep]), *unfinished]:
            folders.remove(self.store, name)
        return sent

    def fetch_run(self, folder: RunFolder) -> None:
        """Brings the run's data into its folder, unless they are there. Raises InputError where the folder holds
        another run."""
        known = self._read_run()
        if known is None:
            raise InputError(Problem(self.store.place(RUN_NAME), "is missing, so nothing names the run's data"))
        if folder.job.exists():
            self._require_same_run(known, folder)
        if folder.manifest.exists():
            if digest_of_data(folder.manifest) != known["data"]:
                what = f"holds other data than the run at {self.store.url}"
                raise InputError(Problem(str(folder.manifest), what, "name another run folder with --run DIR"))
        else:
            name = f"{DATA}/{known['data'][:_DIGITS]}"
            found = [one for one in folders.committed(self.store, DATA)[0] if one.name == name]
            if not found or found[0].fault is not None:
                missing = Problem(self.store.place(name), "is missing: the run's data were not sent whole")
                raise InputError((found[0].fault if found else None) or missing)
            _fetch_whole(self, found[0], folder.path / f".{folder.manifest.name}-{self.owner}", folder.manifest)
        write_atomic(folder.copy, json.dumps({"run": known["run"]}).encode())

    def fetch_checkpoint(self, stored: StoredFolder, root: Path, intact: list[StoredFolder]) -> LocalCheckpoint:
        """Brings a checkpoint under `root`, in place of one of the same step. `intact` are those that are older."""
        step = stored.about["step"]
        draft, target = root / f"step-{step}.partial-{self.owner}", root / f"step-{step}"
        try:
            _fetch_whole(self, stored, draft, target)
        except InputError as error:
            near = self._near(stored, intact)
            raise InputError([replace(problem, nearest=near) for problem in error.problems]) from error
        return read_local(target)

    def _near(self, damaged: StoredFolder, older: list[StoredFolder]) -> str:
        whole = f"{self.store.place(older[-1].name)} is whole; to" if older else "to"
        return f"{whole} go on without it, delete {self.store.place(damaged.name)}"

    def _read_run(self) -> dict[str, str] | None:
        if RUN_NAME not in self.store.entries(RUN_NAME):
            return None
        where = self.store.place(RUN_NAME)
        record = parse_json(self.store.read(RUN_NAME, _RUN_BYTES), where)
        keys = ("run", "owner", "process", "data")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            raise InputError(Problem(where, "does not say which run this is", "name another place with checkpoint.url"))
        return record

    def _require_same_run(self, known: Mapping[str, str] | None, folder: RunFolder) -> str:
        """The name that the store and the run folder both have for the run."""
        mine = read_object(folder.copy, _RUN_BYTES).get("run") if folder.copy.exists() else None
        if known is None or known["run"] != mine:
            near = "name another place with checkpoint.url, or another run folder with --run DIR"
            raise InputError(Problem(self.store.url, f"holds another run than {folder.path}", near))
        return known["run"]

    def _require_ownership(self) -> None:
        known = self._read_run()
        if known is None or known["owner"] != self.owner:
            what = f"{known['process'] if known else 'nobody'} has this run now; nothing more is sent from here"
            near = "stop that one and resume here, or name another place with checkpoint.url"
            raise RunFailed(Problem(self.store.url, what, near))


def bring_back(url: str, folder: RunFolder) -> Mapping[str, Any] | None:
    """Fetches from the store at `url` what a resume of the run in `folder` needs: its data, and its newest checkpoint
    where the folder has none that was committed later and can be read. The caller holds the folder's lock.

    Returns the checkpoint's own JSON (`meta`) where one was fetched, else None. Raises InputError where the store has
    another run than the folder, or where what it has is damaged.
    """
    copy = RunCopy(url)
    held = copy.checkpoints()
    if not held:
        return None
    copy.fetch_run(folder)
    local = newest_local(folder.checkpoints, skip_damaged=True)
    if local is not None and local.sequence >= _sequence(held[-1]):
        return None
    folder.checkpoints.mkdir(exist_ok=True)
    fetched = copy.fetch_checkpoint(held[-1], folder.checkpoints, held[:-1])
    logger.info("fetched %s", copy.store.place(held[-1].name))
    return fetched.meta


def newest_local(root: Path, *, skip_damaged: bool = False) -> LocalCheckpoint | None:
    """The last committed checkpoint under `root`, None if there is none. Raises InputError for a damaged manifest,
    unless these are to be skipped."""
    found = []
    for path in root.glob(f"step-*/{MANIFEST_NAME}"):
        try:
            found += [read_local(path.parent)] if path.parent.suffix == "" else []
        except InputError as error:
            if path.exists() and not skip_damaged:  # otherwise the run deleted it while we looked
                raise
            logger.info("%s", error)
    return max(found, key=lambda one: one.sequence, default=None)


def read_local(folder: Path) -> LocalCheckpoint:
    """What a committed checkpoint's manifest says. Raises InputError where it has not its digest."""
    path = folder / MANIFEST_NAME
    data = read_capped(path, _MANIFEST_BYTES)
    if not has_its_digest(data):
        raise InputError(Problem(str(path), "does not have its digest: it was changed", "use another checkpoint"))
    record = parse_json(data, str(path))
    digest = hashlib.sha256(data).hexdigest()
    return LocalCheckpoint(folder, record["step"], record["sequence"], digest, tuple(record["files"]), record["meta"])


def digest_of_data(manifest: Path) -> str:
    """The digest that names the indexed data of a run."""
    return hashlib.sha256(read_capped(manifest / MANIFEST_NAME, _MANIFEST_BYTES)).hexdigest()


def _sequence(folder: StoredFolder) -> int:
    return int(folder.about["sequence"])


def _fetch_whole(copy: RunCopy, stored: StoredFolder, draft: Path, target: Path) -> None:
    """Fetches a folder under a draft's name, and gives it its own once all of it has its digests."""
    replaced = target.with_name(f"{target.name}.replaced-{copy.owner}")
    try:
        folders.fetch(copy.store, stored, draft)
        if target.exists():
            target.rename(replaced)
        draft.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
