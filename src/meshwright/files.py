"""Writing files: all of a file or none of it, names that outlast a power cut, and values as TOML text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

#: A key that TOML takes without quotes.
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write `data` so that a reader, or a crash, meets the old file or the new one, never a part.

    `durable` waits until file and name are on the disk; without it a power cut may bring the old file back.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (a rename, a new file) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def toml_value(value: Any) -> str:
    """A value as TOML text; raises ValueError for what TOML has no word for."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(one) for one in value) + "]"
    if isinstance(value, dict):
        inside = ", ".join(f"{_toml_key(key)} = {toml_value(one)}" for key, one in value.items() if one is not None)
        return f"{{ {inside} }}" if inside else "{}"
    raise ValueError(f"TOML has no {type(value).__name__}")


def _toml_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else toml_value(key)


def toml_text(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of keys as a TOML file; a value of None is left out, and so is a section with none left."""
    blocks = []
    for section, content in sections.items():
        lines = [f"{_toml_key(key)} = {toml_value(value)}" for key, value in content.items() if value is not None]
        if lines:
            blocks.append("\n".join([f"[{_toml_key(section)}]", *lines, ""]))
    return "\n".join(blocks)
