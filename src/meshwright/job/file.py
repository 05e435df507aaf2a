"""Reading the job file's TOML: `extends`, overrides, the line of every key. Knows no key by name."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.files import BARE_KEY, decode_text

MAX_FILE_BYTES = 1 << 20
COMMAND_LINE = "command line"

_HEADER_LINE = re.compile(r"\s*\[\s*([A-Za-z0-9_.\s-]+?)\s*\]\s*(#.*)?$")
_KEY_LINE = re.compile(r"\s*([A-Za-z0-9_.\s-]+?)\s*=")


@dataclass
class Values:
    """Raw values by section; by dotted key, its origin and the folder that its relative paths start from."""

    sections: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)  # malformed overrides, to be listed with the others


def read_values(path: Path, overrides: Sequence[str] = ()) -> Values:
    """The file at `path`, on top of what it `extends`, with `section.key=value` overrides on top of both.

    Raises InputError for an unreadable file, TOML that does not parse, or a cycle of `extends`.
    """
    values = Values()
    _read_file(path, values, chain=())
    return _apply_overrides(overrides, values)


def read_overrides(overrides: Sequence[str]) -> Values:
    """`section.key=value` overrides alone, with no file below them."""
    return _apply_overrides(overrides, Values())


def _apply_overrides(overrides: Sequence[str], values: Values) -> Values:
    for override in overrides:
        try:
            _apply_override(override, values)
        except InputError as error:
            values.problems += error.problems
    return values


def _read_file(path: Path, values: Values, chain: tuple[Path, ...]) -> None:
    identity = path.resolve()
    if identity in chain:
        circle = " -> ".join(one.name for one in (*chain[chain.index(identity) :], identity))
        raise InputError(Problem(f"{path}: extends", f"the files extend each other in a circle: {circle}"))
    text = _read_text(path)
    table = _parse(path, text)
    lines = key_lines(text)
    base = table.pop("extends", None)
    if base is not None:
        where = _place(path, lines, "extends")
        if not isinstance(base, str) or not base:
            raise InputError(Problem(f"{where}: extends", "must be the path of another job file, in quotes"))
        if "\0" in base or not (path.parent / base).is_file():
            raise InputError(Problem(f"{where}: extends", f"no file {base!r}", nearest_file(path.parent / base)))
        _read_file(path.parent / base, values, (*chain, identity))
    for section, content in table.items():
        if not isinstance(content, dict):
            values.sections[section] = content
            values.origins[section] = _place(path, lines, section)
            continue
        merged = values.sections.setdefault(section, {})
        if not isinstance(merged, dict):
            merged = values.sections[section] = {}
        values.origins.setdefault(section, _place(path, lines, section))
        for key, value in content.items():
            merged[key] = value
            values.origins[f"{section}.{key}"] = _place(path, lines, f"{section}.{key}")
            values.folders[f"{section}.{key}"] = path.parent


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise InputError(Problem(str(path), "is a folder, not a job file", nearest_file(path / "job.toml")))
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise InputError(Problem(str(path), "no such job file", nearest_file(path))) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(Problem(repr(str(path))[1:-1], f"cannot be read ({reason or 'not a path'})")) from None
    if len(data) > MAX_FILE_BYTES:
        raise InputError(Problem(str(path), f"is larger than a job file may be ({MAX_FILE_BYTES} bytes)"))
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(Problem(f"{path}:{line}", "is not UTF-8 text")) from None
    except ValueError as error:
        raise InputError(Problem(str(path), str(error), "save it as UTF-8")) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(Problem(str(path), "nests its values too deeply")) from None
    except ValueError as error:
        message = str(error)
        position = re.search(r" \(at line (\d+), column (\d+)\)$", message)
        where = f"{path}:{position[1]}" if position else str(path)
        what = message[: position.start()] + f" at column {position[2]}" if position else message
        raise InputError(
            Problem(where, f"not valid TOML: {what}", 'write key = value, with text in "quotes"')
        ) from None


def key_lines(text: str) -> dict[str, int]:
    """Dotted key -> its line (from 1), for the sections and keys of a TOML text that parses."""
    lines: dict[str, int] = {}
    section: list[str] = []
    so_far: list[str] = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        header, key = _HEADER_LINE.match(line), _KEY_LINE.match(line)
        if (header or key) and _is_complete("".join(so_far)):
            if header:
                section = [part.strip() for part in header[1].split(".")]
                lines.setdefault(".".join(section), number)
            elif key:
                parts = [*section, *(part.strip() for part in key[1].split("."))]
                for depth in range(1, len(parts) + 1):
                    lines.setdefault(".".join(parts[:depth]), number)
            so_far = []
        so_far.append(line)
    return lines


def _is_complete(text: str) -> bool:
    """Whether lines are whole statements: false within a string or list of several lines."""
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _place(path: Path, lines: dict[str, int], key: str) -> str:
    line = lines.get(key)
    return f"{path}:{line}" if line else str(path)


def _apply_override(override: str, values: Values) -> None:
    name, equals, text = override.partition("=")
    parts = [part.strip() for part in name.split(".")]
    shown = repr(override)[1:-1]
    if not equals or len(parts) < 2 or not all(BARE_KEY.fullmatch(part) for part in parts):
        raise InputError(
            Problem(f"{COMMAND_LINE}: {shown}", "is not section.key=value", "for example: train.steps=100")
        )
    try:
        override.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(Problem(f"{COMMAND_LINE}: {shown}", "is not UTF-8 text")) from None
    content = values.sections
    for depth, part in enumerate(parts[:-1]):
        inner = content.get(part, {})
        if not isinstance(inner, dict):
            holder = ".".join(parts[: depth + 1])
            raise InputError(Problem(f"{COMMAND_LINE}: {shown}", f"the file gives {holder} a value, not keys"))
        content[part] = inner = dict(inner)
        content = inner
    values.origins.setdefault(parts[0], COMMAND_LINE)
    content[parts[-1]] = parse_value(text)
    key = ".".join(parts[:2])
    values.origins[key] = COMMAND_LINE
    values.folders[key] = Path()


def parse_value(text: str) -> Any:
    """A command-line value: TOML if it parses, otherwise a bare string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if list(table) == ["value"] else text


def nearest_file(path: Path) -> str:
    """A phrase that names the entry closest to a missing path."""
    try:
        here = sorted(entry.name for entry in path.parent.iterdir())[:1000]
    except (OSError, ValueError):
        return f"there is no folder {str(path.parent)!r} either"
    hint = nearest_name(path.name, here)
    return hint if hint.startswith("did you mean") else f"looked in {str(path.parent.resolve())!r}"
