"""Reading and writing single files with care: size caps, no links, strict JSON."""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem

#: A file name inside a checkpoint: no separators, no leading dot, so it can never leave its folder.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

#: One write call; the kernel takes at most 2 GiB - 4 KiB in any case.
WRITE_BYTES = 1 << 30


def open_regular(path: Path, *, follow_links: bool = False) -> int:
    """Opens a regular file for reading and returns its descriptor.

    InputError if it is missing, or a link (unless `follow_links`), a pipe, a device or a folder. The folder that holds
    it is checked for being a link too, since `model` and `state` are part of what a manifest can name.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # not blocking: opening a pipe would hang
    if not follow_links:
        flags |= os.O_NOFOLLOW
        if path.parent.is_symlink() and path.parent.name in ("model", "state"):
            raise InputError(Problem(str(path), "its folder is a link, which a checkpoint never has"))
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        what = "it is a link, which a checkpoint never has" if path.is_symlink() else f"cannot be read: {_why(error)}"
        raise InputError(Problem(str(path), what)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(Problem(str(path), "is not a regular file"))
    return descriptor


def read_capped(path: Path, cap_bytes: int, *, follow_links: bool = False) -> bytes:
    """The whole file, InputError if it holds more than `cap_bytes`."""
    descriptor = open_regular(path, follow_links=follow_links)
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(descriptor).st_size
        data = stream.read(cap_bytes + 1) if size <= cap_bytes else b""
    if size > cap_bytes or len(data) > cap_bytes:
        raise InputError(Problem(str(path), f"is {max(size, len(data))} bytes, more than the {cap_bytes} allowed"))
    return data


def map_file(path: Path, *, follow_links: bool = False) -> mmap.mmap | bytes:
    """The file's bytes, mapped for reading (an empty file cannot be mapped and comes as empty bytes)."""
    descriptor = open_regular(path, follow_links=follow_links)
    try:
        if os.fstat(descriptor).st_size == 0:
            return b""
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def parse_json(data: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no repeated keys, no NaN or Infinity, no absurd depth. InputError naming `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise ValueError("a key appears twice in one object")
        return record

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise InputError(Problem(where, "is nested too deeply")) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(Problem(where, f"is not valid JSON ({error})")) from error


def dump_json(record: Any) -> bytes:
    """Compact JSON; ValueError for NaN, Infinity and what JSON cannot hold."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("utf-8")


def write_durably(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at a byte offset. OSError as the system gives it, a full disk among them."""
    while data:
        written = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data = data[written:]
        offset += written


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
