"""Careful reading of files (regular, up to a size, text, strict JSON, digests), atomic writing, and TOML text."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem

#: A key that TOML accepts without quotes.
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

_MANIFEST_BYTES = 256 << 20  # largest manifest of a checkpoint that is read
_DIGEST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')


def open_regular(path: Path, *, follow_links: bool = False) -> int:
    """Opens a regular file for reading and returns its descriptor.

    Raises InputError if it is missing, or a link (unless `follow_links`), a pipe, a device or a folder. Its folder may
    not be a link either where it is named `model` or `state`, since a checkpoint's manifest can name those.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # without O_NONBLOCK opening a pipe would hang
    if not follow_links:
        flags |= os.O_NOFOLLOW
        if path.parent.is_symlink() and path.parent.name in ("model", "state"):
            raise InputError(Problem(str(path), "its folder is a link, which a checkpoint never has"))
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        what = "it is a link, which a checkpoint never has" if path.is_symlink() else f"cannot be read: {reason}"
        raise InputError(Problem(str(path), what)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(Problem(str(path), "is not a regular file"))
    return descriptor


def read_capped(path: Path, cap_bytes: int, *, follow_links: bool = False) -> bytes:
    """The whole file. Raises InputError if it holds more than `cap_bytes`."""
    descriptor = open_regular(path, follow_links=follow_links)
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(descriptor).st_size
        data = stream.read(cap_bytes + 1) if size <= cap_bytes else b""
    if size > cap_bytes or len(data) > cap_bytes:
        raise InputError(Problem(str(path), f"is {max(size, len(data))} bytes, more than the {cap_bytes} allowed"))
    return data


def read_object(path: Path, cap_bytes: int) -> dict[str, Any]:
    """The JSON object in a file, links followed. Raises InputError naming the file where it holds none."""
    record = parse_json(read_capped(path, cap_bytes, follow_links=True), str(path))
    if not isinstance(record, dict):
        raise InputError(Problem(str(path), "is not a JSON object"))
    return record


def parse_json(data: bytes, where: str) -> Any:
    """`strict_json`, with an InputError naming `where`."""
    try:
        return strict_json(data)
    except RecursionError:
        raise InputError(Problem(where, "is nested too deeply")) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(Problem(where, f"is not valid JSON ({error})")) from error


def strict_json(data: bytes) -> Any:
    """Parse JSON in UTF-8 without repeated keys, NaN or Infinity. Raises ValueError, or RecursionError for deep
    nesting."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not a number of JSON")

    return json.loads(decode_text(data), object_pairs_hook=unique_keys, parse_constant=refuse)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of `pairs`. Raises ValueError for a repeated key."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {repeated[:40]!r} is given twice")
    return record


def with_digest(record: bytes) -> bytes:
    """The JSON object `record`, of one key or more, with a first line that has the SHA-256 of all that follows it."""
    rest = record.removeprefix(b"{").lstrip()
    return b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def has_its_digest(data: bytes) -> bool | None:
    """Whether the digest in the first line is that of all that follows it; None without such a line."""
    line = _DIGEST_LINE.match(data)
    if line is None:
        return None
    return hashlib.sha256(memoryview(data)[line.end() :]).hexdigest().encode() == line.group(1)


def refuse_damaged(model: Path, contents: Mapping[str, bytes | None]) -> None:
    """Raises InputError naming a file of the folder `model` whose content in `contents` (None: it is missing) is other
    than the manifest of the checkpoint that `model` is of says; it need not be of one."""
    model = model.resolve()
    path = model.parent / "manifest.json"
    if model.name != "model" or not path.exists():
        return
    data = read_capped(path, _MANIFEST_BYTES)
    if not has_its_digest(data):
        raise InputError(Problem(str(path), "does not have its digest: it was changed", "use another checkpoint"))
    listed = parse_json(data, str(path))["files"]
    problems = [
        Problem(str(model / name), "does not have the manifest's digest: it was changed", "use another checkpoint")
        for name, content in contents.items()
        if (file := listed.get(f"model/{name}")) and hashlib.sha256(content or b"").hexdigest() != file["sha256"]
    ]
    if problems:
        raise InputError(problems)


def decode_text(data: bytes) -> str:
    """Text from outside: UTF-8, without a byte order mark at its start.

    Raises ValueError that says what it is instead, a UnicodeDecodeError if it is not UTF-8 at some place.
    """
    if is_utf16(data):
        raise ValueError("is not UTF-8 text but UTF-16, by its byte order mark")
    if b"\0" in data:
        raise ValueError("holds NUL bytes, so it is UTF-16 or no text")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")


def is_utf16(data: bytes) -> bool:
    """Whether text begins with a byte order mark of UTF-16 or UTF-32."""
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))


@contextlib.contextmanager
def named_in_errors(path: Path, *, draft: Path | None = None) -> Iterator[None]:
    """Puts `path` into an OSError that names no file, as that of a write to a full disk, or that names its `draft`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(draft)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write `data` so that a reader, even after a crash, sees the old file or the new one, never a part.

    `durable` waits until file and name are on the disk; without it the old file may be back after a power cut.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with named_in_errors(path, draft=draft):
        _write_draft(draft, path, data, mode, durable)
    if durable:
        sync_folder(path.parent)


def _write_draft(draft: Path, path: Path, data: bytes, mode: int, durable: bool) -> None:
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


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def toml_value(value: Any) -> str:
    """A value as TOML text. Raises ValueError for a type that TOML does not have."""
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
    """Sections of keys as a TOML file, without values of None and without empty sections."""
    blocks = []
    for section, content in sections.items():
        lines = [f"{_toml_key(key)} = {toml_value(value)}" for key, value in content.items() if value is not None]
        if lines:
            blocks.append("\n".join([f"[{_toml_key(section)}]", *lines, ""]))
    return "\n".join(blocks)
