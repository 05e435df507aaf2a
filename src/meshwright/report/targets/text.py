"""Text of manifests: YAML that every reader takes for the same, comments, words for a shell, sizes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

#: Text that no version of YAML takes for anything else, unless it is one of these words.
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"))
MIB = 1 << 20
#: Characters that YAML cannot hold in a block of lines; such text is quoted.
NOT_IN_BLOCKS = re.compile(r"[^\n\x20-\x7e]| $| \n")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Plain where nobody can take it for a number or a truth value, in lines where it has some, else quoted."""
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        style = None
    elif "\n" in value and not NOT_IN_BLOCKS.search(value):
        style = "|"
    else:
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def yaml_text(documents: Iterable[tuple[Sequence[str], dict[str, Any]]]) -> str:
    """Documents of YAML in one file, each with the lines of comment before it."""
    parts = [
        comments(lines) + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=False)
        for lines, document in documents
    ]
    return "---\n".join(parts)


def comments(lines: Iterable[str]) -> str:
    """Each as a line of comment, whatever characters it holds."""
    return "".join(f"# {_one_line(line)}\n" if line else "#\n" for line in lines)


def not_said(omitted: Iterable[str]) -> list[str]:
    """What a target cannot express, as lines for a comment."""
    return [f"not said here: {one}" for one in omitted]


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def shell_words(words: Iterable[str]) -> str:
    """Words for a shell, quoted where they need it."""
    return shlex.join(words)


def mebibytes(size: int) -> int:
    """Bytes as whole MiB, rounded up."""
    return -(-size // MIB)
