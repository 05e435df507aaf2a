"""Files of a checkpoint: names, memory maps, JSON."""

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
