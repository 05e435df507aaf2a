"""What surrounds this process: environment variables, read here alone, a typed function for each; control groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Set by `launch` for the processes that it starts, never by hand.
WORKER_SPEC = "MESHWRIGHT_WORKER_SPEC"
WORKER_PARENT = "MESHWRIGHT_WORKER_PARENT"
WORKER_ANSWER = "MESHWRIGHT_WORKER_ANSWER"
#: Set for a driver that `--detach` has started.
DETACHED = "MESHWRIGHT_DETACHED"
#: Where Linux shows control groups, by which containers and services limit what they hold, and those of this process.
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

# gRPC reads it when it is imported. By itself it writes a line to stderr for every stranger who connects.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@dataclass(frozen=True)
class WorkerFiles:
    """The environment of a process that `launch` started: descriptors of the files that say what it does and that take
    its result, and the process id of its `parent`."""

    spec: int
    answer: int
    parent: int


def debug() -> bool:
    """MESHWRIGHT_DEBUG: show tracebacks and debug lines."""
    return os.environ.get("MESHWRIGHT_DEBUG", "") not in ("", "0")


def detached() -> bool:
    """MESHWRIGHT_DETACHED: this driver has been detached from the terminal that started it."""
    return bool(os.environ.get(DETACHED))


def instruction_level() -> str:
    """ONEDNN_MAX_CPU_ISA: the newest instructions of the CPU that oneDNN may use, such as AVX2; "" allows all."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def worker_files() -> WorkerFiles | None:
    """Those of this process; None where `launch` did not start it."""
    if WORKER_SPEC not in os.environ:
        return None
    return WorkerFiles(*(int(os.environ[name]) for name in (WORKER_SPEC, WORKER_ANSWER, WORKER_PARENT)))


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
