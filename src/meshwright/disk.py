"""The disk that a run folder is on, as the ranks see it: this machine's own, or the driver's, reached through the hub.

Few operations, so that another disk is easily written; `launch.hub_disk` is the one through the hub.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meshwright.errors import InputError
from meshwright.files import read_capped, sync_folder, write_atomic

#: Bytes of one write call; the kernel's limit is 2 GiB - 4 KiB.
WRITE_BYTES = 1 << 30

Piece = tuple[int, "memoryview | bytes"]


@dataclass(frozen=True)
class Entry:
    """A regular file or a folder; `changed_ns` is when its content last changed, of a folder its names."""

    is_folder: bool
    bytes: int
    changed_ns: int


class Disk(Protocol):
    """All methods raise the system's OSError. What is called twice has the effect of one call, but for `rename`."""

    def entry(self, path: Path) -> Entry | None:
        """What is at `path`; None for nothing, a link or a special file."""

    def entries(self, folder: Path) -> dict[str, Entry]:
        """The regular files and folders in a folder by name; {} where there is no such folder."""

    def read(self, path: Path, cap_bytes: int) -> bytes | None:
        """The whole file, None where there is none. Raises InputError for a link, a special file, a folder, or one of
        more than `cap_bytes`."""

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Writes a file whole or not at all; see files.write_atomic."""

    def resize(self, path: Path, size_bytes: int) -> None:
        """Cuts or extends a file that is there, and waits until its content is on the disk."""

    def write_at(self, path: Path, pieces: Iterable[Piece], *, durable: bool = True) -> None:
        """Writes each piece, (byte offset, bytes), into a file that is there; `durable` waits until its content is on
        the disk."""

    def make_folder(self, path: Path) -> None:
        """Makes a folder in one that is there; it may be there already."""

    def rename(self, path: Path, target: Path) -> None:
        """Gives a file or folder another name, at once or not at all."""

    def remove(self, path: Path) -> None:
        """Deletes a file, or a folder with all in it, if it is there."""

    def sync(self, folder: Path) -> None:
        """Waits until the names in a folder are on the disk."""


class OwnDisk:
    """The disk of this machine."""

    def entry(self, path: Path) -> Entry | None:
        try:
            return _entry(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def entries(self, folder: Path) -> dict[str, Entry]:
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as listed:
            for one in listed:
                with contextlib.suppress(FileNotFoundError):  # deleted while we looked
                    found[one.name] = _entry(one.stat(follow_symlinks=False))
        return {name: entry for name, entry in sorted(found.items()) if entry is not None}

    def read(self, path: Path, cap_bytes: int) -> bytes | None:
        try:
            return read_capped(path, cap_bytes)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise

    def write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        write_atomic(path, data, durable=durable)

    def resize(self, path: Path, size_bytes: int) -> None:
        with _opened(path) as descriptor:
            os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)

    def write_at(self, path: Path, pieces: Iterable[Piece], *, durable: bool = True) -> None:
        with _opened(path) as descriptor:
            for offset, data in pieces:
                write_at(descriptor, memoryview(data), offset)
            if durable:
                os.fsync(descriptor)

    def make_folder(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def rename(self, path: Path, target: Path) -> None:
        path.rename(target)

    def remove(self, path: Path) -> None:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        shutil.rmtree(path, ignore_errors=True)  # another process may delete it too
        if path.exists():
            shutil.rmtree(path)

    def sync(self, folder: Path) -> None:
        sync_folder(folder)


OWN_DISK = OwnDisk()


def require(disk: Disk, path: Path) -> None:
    """Raises FileNotFoundError where there is nothing at `path`."""
    if disk.entry(path) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at a byte offset. Raises the system's OSError, for a full disk too."""
    while data:
        written = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data = data[written:]
        offset += written


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file that is there, opened for writing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _entry(status: os.stat_result) -> Entry | None:
    is_folder = stat.S_ISDIR(status.st_mode)
    if not is_folder and not stat.S_ISREG(status.st_mode):
        return None
    return Entry(is_folder, status.st_size, status.st_mtime_ns)
