"""Looks for pickles in a folder: what Meshwright writes has none."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path

#: Files that hold pickles by custom, whatever is in them.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".metadata")


def assert_no_pickles(folder: Path) -> None:
    """Fails, naming the file, if a file under `folder` is a pickle, a zip (torch.save's container) or named like one.

    safetensors and JSON files must also read as what they say they are.
    """
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_file():
            continue
        assert path.suffix not in PICKLE_SUFFIXES and path.name not in PICKLE_SUFFIXES, f"{path} is named like a pickle"
        data = path.read_bytes()
        assert not data.startswith(b"PK\x03\x04"), f"{path} is a zip, as torch.save and numpy.savez write"
        assert not _is_pickle(data), f"{path} is a pickle"
        if path.suffix == ".json":
            json.loads(data)
        if path.suffix == ".safetensors":
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _is_pickle(data: bytes) -> bool:
    """Whether the bytes are opcodes up to a STOP, as every pickle is; short texts that happen to be are let through."""
    if not data.startswith((b"\x80", b"(", b"c", b"]", b"}")) or b"." not in data:
        return False
    if data.startswith((b"]", b"}")) and len(data) < 4:
        return False
    try:
        for _ in pickletools.genops(data):
            pass
    except (ValueError, IndexError, UnicodeDecodeError, AttributeError):
        return False
    return True
