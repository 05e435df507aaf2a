"""The run folder for ranks of nodes that do not see its disk: what they may read and write there, at the driver.

They read job, plan, data and checkpoints, and nothing else: other folders hold secrets. They write in the lease of
their generation alone, and give checkpoints their names: out of the lease `step-N`, and from there
`step-N.replaced-...` or `step-N.removed-...`.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from meshwright.disk import OWN_DISK, Entry, require
from meshwright.errors import InputError, MeshwrightError
from meshwright.files import open_regular
from meshwright.launch.messages import error_to_dict
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.run import RunFolder

#: The most bytes of a path: below the kernel's limit for the name of one file.
MAX_PATH_BYTES = 240
#: The most bytes of a file in one message.
MAX_BYTES = 16 << 20
#: Answers that are kept for requests that come twice.
ANSWERS = 256

Read, Write = wire.ReadRequest, wire.WriteRequest


class Refused(Exception):
    """A request for what a rank may not do; its words are for the rank."""


class RunFiles:
    """The files of the run folder `run` (None: the job has none). Methods may be called from any thread."""

    def __init__(self, run: Path | None) -> None:
        self._run = None if run is None else RunFolder(run.resolve())
        self._renaming = threading.Lock()
        self._renamed: OrderedDict[int, wire.WriteReply] = OrderedDict()

    def read(self, request: wire.ReadRequest) -> wire.ReadReply:
        """Raises Refused for a path that is not for ranks, or leads through a link."""
        path = self._path(request.path)
        if request.count > MAX_BYTES:
            raise Refused(f"{request.count} bytes at once are more than the {MAX_BYTES} allowed")
        reply = wire.ReadReply()
        reply.fault.CopyFrom(_fault_of(lambda: _read(request, path, reply)))
        return reply

    def write(self, request: wire.WriteRequest, generation: int) -> wire.WriteReply:
        """Raises Refused for a path that `generation` may not write."""
        path = self._path(request.path)
        if sum(len(piece.data) for piece in request.pieces) > MAX_BYTES:
            raise Refused(f"more than the {MAX_BYTES} bytes allowed at once")
        if request.operation == Write.RENAME:
            return self._rename(request, path, self._path(request.target), generation)
        lease = self._lease(generation)
        names_alone = request.operation == Write.SYNC and path in (lease, lease.parent)
        if not (names_alone or lease in path.parents or (request.operation == Write.REMOVE and self._is_step(path))):
            raise Refused(f"{request.path} is not in {lease.name}, the folder of generation {generation}")
        return wire.WriteReply(fault=_fault_of(lambda: _write(request, path, lease)))

    def _rename(self, request: wire.WriteRequest, path: Path, target: Path, generation: int) -> wire.WriteReply:
        """A request that comes twice, because the answer was lost, is answered as before."""
        lease = self._lease(generation)
        if not (lease in path.parents or self._is_step(path)):
            raise Refused(f"{request.path} is not in {lease.name}, the folder of generation {generation}")
        if not (lease in target.parents and lease in path.parents) and not self._is_step(target):
            raise Refused(f"{request.target} is no name of a checkpoint")
        if not request.id:
            raise Refused("a renaming without an id")
        with self._renaming:  # the second may come while the first is at work
            if (known := self._renamed.get(request.id)) is not None:
                return known
            reply = wire.WriteReply(fault=_fault_of(lambda: _rename(path, target, lease)))
            self._renamed[request.id] = reply
            while len(self._renamed) > ANSWERS:
                self._renamed.popitem(last=False)
            return reply

    def _folder(self) -> RunFolder:
        if self._run is None:
            raise Refused("this job has no run folder")
        return self._run

    def _lease(self, generation: int) -> Path:
        return self._folder().lease(generation)

    def _is_step(self, path: Path) -> bool:
        """Whether the path is the name of a checkpoint's folder."""
        return path.parent == self._folder().checkpoints and path.name.startswith("step-")

    def _path(self, text: str) -> Path:
        """The path in the run folder that `text` names."""
        run, parts = self._folder(), text.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts) or len(text.encode()) > MAX_PATH_BYTES:
            raise Refused(f"{text[:200]!r} is no path in the run folder")
        if parts[0] not in {one.name for one in (run.job, run.plan, run.manifest, run.checkpoints)}:
            raise Refused(f"{parts[0][:200]!r} is not for ranks")
        path = run.path
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise Refused(f"{text[:200]!r} leads through a link")
        return path


def _read(request: wire.ReadRequest, path: Path, reply: wire.ReadReply) -> None:
    if request.operation == Read.ENTRIES:
        reply.entries.extend(_entry(name, entry) for name, entry in OWN_DISK.entries(path).items())
        return
    found = OWN_DISK.entry(path)
    if found is None:
        return
    reply.entries.append(_entry("", found))
    if request.operation == Read.CONTENT:
        try:
            descriptor = open_regular(path)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # deleted while we looked
                del reply.entries[:]
                return
            raise
        with os.fdopen(descriptor, "rb") as file:
            file.seek(request.offset)
            reply.content = file.read(request.count)


def _write(request: wire.WriteRequest, path: Path, lease: Path) -> None:
    require(OWN_DISK, lease)  # it is taken away before another generation begins
    operation, durable = request.operation, request.durable
    if operation == Write.WRITE:
        OWN_DISK.write(path, b"".join(piece.data for piece in request.pieces), durable=durable)
    elif operation == Write.RESIZE:
        OWN_DISK.resize(path, request.size_bytes)
    elif operation == Write.WRITE_AT:
        OWN_DISK.write_at(path, [(piece.offset, piece.data) for piece in request.pieces], durable=durable)
    elif operation == Write.MAKE_FOLDER:
        OWN_DISK.make_folder(path)
    elif operation == Write.REMOVE:
        OWN_DISK.remove(path)
    elif operation == Write.SYNC:
        OWN_DISK.sync(path)


def _rename(path: Path, target: Path, lease: Path) -> None:
    require(OWN_DISK, lease)  # it is taken away before another generation begins
    OWN_DISK.rename(path, target)


def _entry(name: str, entry: Entry) -> wire.Entry:
    return wire.Entry(name=name, is_folder=entry.is_folder, bytes=entry.bytes, changed_ns=entry.changed_ns)


def _fault_of(act: Callable[[], None]) -> wire.Fault:
    """Does it; how it failed."""
    try:
        act()
    except OSError as error:
        return wire.Fault(errno=error.errno or errno.EIO)
    except (OverflowError, ValueError):  # an offset or a size that no file has
        return wire.Fault(errno=errno.EINVAL)
    except MeshwrightError as error:
        return wire.Fault(error=json.dumps(error_to_dict(error)).encode())
    return wire.Fault()
