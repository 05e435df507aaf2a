"""What must be equal on all nodes of a job: the code, torch's and Python's versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import meshwright


@dataclass(frozen=True)
class Versions:
    """`code_digest` is of the sources of this package."""

    code_digest: str
    torch: str
    python: str


@cache
def own_versions() -> Versions:
    """Those of this process. torch's is read from its metadata: torch is not loaded."""
    digest = hashlib.sha256()
    root = Path(meshwright.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    torch = importlib.metadata.version("torch").partition("+")[0]
    python = ".".join(platform.python_version_tuple()[:2])
    return Versions(digest.hexdigest(), torch, python)


def difference(hub: Versions, node: Versions) -> str:
    """In words, how a node's versions differ from the hub's; "" where they are equal."""
    for what, ours, theirs in (
        ("torch", hub.torch, node.torch),
        ("Python", hub.python, node.python),
        ("the code of meshwright", hub.code_digest[:12], node.code_digest[:12]),
    ):
        if ours != theirs:
            return f"{what} is {theirs} there and {ours} at the driver: install the same on both"
    return ""
