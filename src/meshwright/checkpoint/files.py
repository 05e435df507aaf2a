"""Files of a checkpoint: names, memory maps, durable writes."""

from __future__ import annotations

import json
import mmap
import os
import re
from pathlib import Path
from typing import Any

from meshwright.files import open_regular

#: A file name inside a checkpoint: without separators or a leading dot, so it cannot leave its folder.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

#: Bytes of one write call; the kernel's limit is 2 GiB - 4 KiB.
WRITE_BYTES = 1 << 30


def map_file(path: Path, *, follow_links: bool = False) -> mmap.mmap | bytes:
    """The file mapped for reading; b"" for an empty file, which cannot be mapped."""
    descriptor = open_regular(path, follow_links=follow_links)
    try:
        if os.fstat(descriptor).st_size == 0:
            return b""
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def dump_json(record: Any) -> bytes:
    """Compact JSON. Raises ValueError for NaN and Infinity, TypeError for other values that JSON lacks."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("utf-8")


def write_durably(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at a byte offset. Raises the system's OSError, for a full disk too."""
    while data:
        written = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data = data[written:]
        offset += written
