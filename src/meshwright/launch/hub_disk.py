"""The disk of the run folder as a rank sees it whose node does not have it: through the hub. See `disk` and
`run_files`."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from meshwright.disk import Entry, Piece
from meshwright.errors import InputError, Problem
from meshwright.launch.messages import error_from_dict
from meshwright.launch.wire import hub_pb2 as wire

#: Bytes of a file that one message carries, and pieces of it.
CHUNK_BYTES = 8 << 20
CHUNK_PIECES = 4096
#: A file that is written anew while it is read is read again, so often.
TRIES = 10

Read, Write = wire.ReadRequest, wire.WriteRequest


class _Changed(InputError):
    """A file was written anew while it was read."""


class HubDisk:
    """A `disk.Disk` of paths in `root`, the run folder at the driver. Raises RunFailed where the hub refuses a request:
    of an older generation, or for a path that ranks may not touch."""

    def __init__(
        self,
        root: Path,
        read: Callable[[wire.ReadRequest], wire.ReadReply],
        write: Callable[[wire.WriteRequest], wire.WriteReply],
    ) -> None:
        self.root, self._read, self._write = root, read, write

    def entry(self, path: Path) -> Entry | None:
        found = self._ask(Read.ENTRY, path).entries
        return _entry(found[0]) if found else None

    def entries(self, folder: Path) -> dict[str, Entry]:
        return {one.name: _entry(one) for one in self._ask(Read.ENTRIES, folder).entries}

    def read(self, path: Path, cap_bytes: int) -> bytes | None:
        for number in range(1, TRIES + 1):
            content = bytearray()
            try:
                for chunk in self._chunks(path):
                    content += chunk
                    if len(content) > cap_bytes:
                        raise InputError(Problem(str(path), f"is more than the {cap_bytes} bytes allowed"))
                return bytes(content)
            except FileNotFoundError:
                return None
            except _Changed:
                if number == TRIES:
                    raise
        raise AssertionError

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        if len(data) <= CHUNK_BYTES:
            self._tell(Write.WRITE, path, pieces=[wire.FilePiece(data=data)], durable=durable)
            return
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self.write(draft, b"", durable=False)
        self.write_at(draft, [(0, data)], durable=durable)
        self.rename(draft, path)
        if durable:
            self.sync(path.parent)

    def resize(self, path: Path, size_bytes: int) -> None:
        self._tell(Write.RESIZE, path, size_bytes=size_bytes)

    def write_at(self, path: Path, pieces: Iterable[Piece], *, durable: bool = True) -> None:
        full: list[wire.FilePiece] = []
        for batch in _batches(pieces):
            if full:
                self._tell(Write.WRITE_AT, path, pieces=full)
            full = batch
        self._tell(Write.WRITE_AT, path, pieces=full, durable=durable)

    def make_folder(self, path: Path) -> None:
        self._tell(Write.MAKE_FOLDER, path)

    def rename(self, path: Path, target: Path) -> None:
        self._tell(Write.RENAME, path, target=self._name(target))

    def remove(self, path: Path) -> None:
        self._tell(Write.REMOVE, path)

    def sync(self, folder: Path) -> None:
        self._tell(Write.SYNC, folder)

    def fetch(self, path: Path, copy: Path) -> int:
        """Copies a file, or a folder with all in it, to `copy` on this node's disk; returns how many bytes. Raises
        FileNotFoundError where there is none."""
        found = self.entry(path)
        if found is not None and found.is_folder:
            copy.mkdir(parents=True, exist_ok=True)
            return sum(self.fetch(path / name, copy / name) for name in self.entries(path))
        with open(copy, "wb") as file:
            for chunk in self._chunks(path):
                file.write(chunk)
            return file.tell()

    def _chunks(self, path: Path) -> Iterator[bytes]:
        """The content of a file in parts. Raises FileNotFoundError where there is none, InputError where it is changed
        meanwhile."""
        offset, first = 0, None
        while True:
            reply = self._ask(Read.CONTENT, path, offset=offset, count=CHUNK_BYTES)
            if not reply.entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            first = first or reply.entries[0]
            if reply.entries[0] != first:
                raise _Changed(Problem(str(path), "was changed while it was read"))
            yield reply.content
            offset += len(reply.content)
            if offset >= first.bytes or not reply.content:
                return

    def _ask(self, operation: Any, path: Path, **fields: Any) -> wire.ReadReply:
        reply = self._read(wire.ReadRequest(operation=operation, path=self._name(path), **fields))
        _raise(reply.fault, path)
        return reply

    def _tell(self, operation: Any, path: Path, **fields: Any) -> None:
        number = 1 + secrets.randbelow(2**64 - 1)
        request = wire.WriteRequest(operation=operation, path=self._name(path), id=number, **fields)
        _raise(self._write(request).fault, path)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[wire.FilePiece]]:
    """The pieces, large ones cut, in lists that one message carries."""
    batch: list[wire.FilePiece] = []
    room = CHUNK_BYTES
    for offset, data in pieces:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[:room]
            batch.append(wire.FilePiece(offset=offset, data=bytes(part)))
            offset, view, room = offset + len(part), view[len(part) :], room - len(part)
            if not room or len(batch) == CHUNK_PIECES:
                yield batch
                batch, room = [], CHUNK_BYTES
    if batch:
        yield batch


def _entry(one: wire.Entry) -> Entry:
    return Entry(one.is_folder, one.bytes, one.changed_ns)


def _raise(fault: wire.Fault, path: Path) -> None:
    if fault.errno:
        raise OSError(fault.errno, os.strerror(fault.errno), str(path))
    if fault.error:
        raise error_from_dict(json.loads(fault.error))
