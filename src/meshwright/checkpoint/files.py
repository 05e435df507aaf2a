"""Files of a checkpoint: names, memory maps, writes that wait for the disk."""

from __future__ import annotations

import json
import mmap
import os
import re
from pathlib import Path
from typing import Any

from meshwright.files import open_regular

#: A file name inside a checkpoint: no separators, no leading dot, so it can never leave its folder.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

#: One write call; the kernel takes at most 2 GiB - 4 KiB in any case.
WRITE_BYTES = 1 << 30


def map_file(path: Path, *, follow_links: bool = False) -> mmap.mmap | bytes:
    """The file's bytes, mapped for reading (an empty file cannot be mapped and comes as empty bytes)."""
    descriptor = open_regular(path, follow_links=follow_links)
    try:
        if os.fstat(descriptor).st_size == 0:
            return b""
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


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
