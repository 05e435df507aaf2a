"""The one file that reads environment variables: each is an accessor with a type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Set by `launch` for the processes that it starts; nobody sets them by hand.
WORKER_FOLDER = "MESHWRIGHT_WORKER_FOLDER"
WORKER_PARENT = "MESHWRIGHT_WORKER_PARENT"


@dataclass(frozen=True)
class WorkerContext:
    """What a started process finds in its environment. `folder` is the private folder, `parent` a process id."""

    rank: int
    world: int
    folder: Path
    parent: int


def debug() -> bool:
    """MESHWRIGHT_DEBUG: show tracebacks and debug lines."""
    return os.environ.get("MESHWRIGHT_DEBUG", "") not in ("", "0")


def worker_context() -> WorkerContext | None:
    """Rank, world and private folder of a process that `launch` started; None in any other process."""
    if WORKER_FOLDER not in os.environ:
        return None
    return WorkerContext(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        folder=Path(os.environ[WORKER_FOLDER]),
        parent=int(os.environ[WORKER_PARENT]),
    )


def for_child(changes: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `changes` made, and `defaults` where the user has set nothing."""
    return {**defaults, **os.environ, **changes}
