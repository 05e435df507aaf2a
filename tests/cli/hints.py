"""Follows the hint of an error as a person would: changes the command by what it says."""

from __future__ import annotations

import difflib
import re

#: "train.steps=3", "model.arguments.width=4".
_SETTING = r"[a-z_]+(?:\.[a-z_]+)+ ?= ?[^\s,;]+"
_KEY = re.compile(r"\b[a-z]+\.[a-z_]+\b")
_LINE = re.compile(r"(?:error: )?(?:command line: )?(?P<where>[^ :]+(?:, [^ :]+)*): ")


def follow(words: list[str], line: str) -> list[str] | None:
    """The command `words` changed by the hint in `line` of stderr; None if that names nothing to change it by."""
    if command := re.search(r"meshwright ((?:train|plan|serve|generate|report) [^;]*)", line):
        return command.group(1).split()
    if settings := re.search(rf"(?:nearest|for example): ({_SETTING}(?: {_SETTING})*)", line):
        return _set(words, re.findall(_SETTING, settings.group(1)))
    if meant := re.search(r"did you mean '([^']+)'", line):
        return _respell(words, meant.group(1))
    key = _key(words, line)
    if value := re.search(r"nearest: ([^\s;,]+)", line):
        return _set(words, [f"{key}={value.group(1)}"]) if key else None
    if flag := re.search(r"leave (--\S+) out|leave out (--\S+)", line):
        return [word for word in words if word not in flag.groups()]
    if "leave it out" in line and key:
        return [word for word in words if not word.startswith(f"{key}=")]
    if "--run DIR" in line:
        return _flag(words, "--run", "elsewhere")
    return None


def _key(words: list[str], line: str) -> str | None:
    """The key that an error is about."""
    where = _LINE.match(line)
    keys = _KEY.findall(where.group("where") if where else "")
    return keys[0] if keys else None


def _set(words: list[str], settings: list[str]) -> list[str]:
    pairs = dict(re.split(" ?= ?", setting, maxsplit=1) for setting in settings)
    kept = [word for word in words if word.partition("=")[0] not in pairs]
    bare = {key.partition(".")[2] for key in pairs}  # "steps" for "train.steps"
    return [*(word for word in kept if word not in bare), *(f"{key}={value}" for key, value in pairs.items())]


def _flag(words: list[str], flag: str, value: str) -> list[str]:
    if flag not in words:
        return [*words, flag, value]
    at = words.index(flag)
    return [*words[: at + 1], value, *words[at + 2 :]]


def _respell(words: list[str], meant: str) -> list[str]:
    """Replaces the part of the command that is most like `meant`."""
    pattern = r"[\w.-]+" if "." in meant else r"[\w-]+"
    parts = {part for word in words for part in re.findall(pattern, word) if part != meant}
    wrong = max(sorted(parts), key=lambda part: difflib.SequenceMatcher(None, part, meant).ratio())
    return [re.sub(rf"(?<![\w-]){re.escape(wrong)}(?![\w-])", meant, word) for word in words]
