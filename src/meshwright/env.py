"""What surrounds this process: environment variables, read here alone, a typed function for each; control groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Set by `launch` for the processes that it starts, never by hand.
WORKER_FOLDER = "MESHWRIGHT_WORKER_FOLDER"
WORKER_PARENT = "MESHWRIGHT_WORKER_PARENT"
WORKER_ANSWER = "MESHWRIGHT_WORKER_ANSWER"
#: Where Linux shows control groups, by which containers and services limit what they hold, and those of this process.
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class WorkerContext:
    """The environment of a process that `launch` started. `folder` is the private folder, `parent` a process id,
    `answer` the descriptor of the file for its result."""

    rank: int
    world: int
    folder: Path
    parent: int
    answer: int


def debug() -> bool:
    """MESHWRIGHT_DEBUG: show tracebacks and debug lines."""
    return os.environ.get("MESHWRIGHT_DEBUG", "") not in ("", "0")


def instruction_level() -> str:
    """ONEDNN_MAX_CPU_ISA: the newest instructions of the CPU that oneDNN may use, such as AVX2; "" allows all."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def worker_context() -> WorkerContext | None:
    """The context of this process; None where `launch` did not start it."""
    if WORKER_FOLDER not in os.environ:
        return None
    return WorkerContext(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        folder=Path(os.environ[WORKER_FOLDER]),
        parent=int(os.environ[WORKER_PARENT]),
        answer=int(os.environ[WORKER_ANSWER]),
    )


def trainer_status() -> tuple[str, Path, Path] | None:
    """KUBEFLOW_TRAINER_SERVER_URL, _CA_CERT and _TOKEN, which Kubeflow Trainer sets for the step that posts its
    progress: the address, the file of the authority, the file of the token. None where it does not run us."""
    names = ("KUBEFLOW_TRAINER_SERVER_URL", "KUBEFLOW_TRAINER_SERVER_CA_CERT", "KUBEFLOW_TRAINER_SERVER_TOKEN")
    url, authority, token = (os.environ.get(name, "") for name in names)
    return (url, Path(authority), Path(token)) if url and authority and token else None


def for_child(changes: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, overridden by `changes`, with `defaults` for variables that are not set."""
    return {**defaults, **os.environ, **changes}


def control_groups(controller: str) -> tuple[Path, ...]:
    """Folders of the control groups that hold this process: its own, and those above, whose limits count as well.

    controller: "cpu" or "memory", for systems where each has a tree of its own (version 1). In a container, paths may
    be those of the host, of which only the container's own group is mounted, at the root.
    """
    folders: list[Path] = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            inside = Path(path.lstrip("/"))
            root = CGROUPS / controller if controllers else CGROUPS
            folders += [root / part for part in (inside, *inside.parents)]
    return tuple(folder for folder in folders if folder.is_dir())
