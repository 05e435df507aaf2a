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


def cache_folder() -> Path:
    """Where what was downloaded is kept: XDG_CACHE_HOME/meshwright, by default ~/.cache/meshwright."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshwright"


def worker_files() -> WorkerFiles | None:
    """Those of this process; None where `launch` did not start it."""
    if WORKER_SPEC not in os.environ:
        return None
    return WorkerFiles(*(int(os.environ[name]) for name in (WORKER_SPEC, WORKER_ANSWER, WORKER_PARENT)))


def trainer_status() -> tuple[str, Path, Path] | None:
    """KUBEFLOW_TRAINER_SERVER_URL, _CA_CERT and _TOKEN, which Kubeflow Trainer sets for the step that posts its
    progress: the address, the file of the authority, the file of the token. None where it does not run us."""
    names = ("KUBEFLOW_TRAINER_SERVER_URL", "KUBEFLOW_TRAINER_SERVER_CA_CERT", "KUBEFLOW_TRAINER_SERVER_TOKEN")
    url, authority, token = (os.environ.get(name, "") for name in names)
    return (url, Path(authority), Path(token)) if url and authority and token else None


def for_child(changes: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, overridden by `changes`, with `defaults` for variables that are not set."""
    return {**defaults, **os.environ, **changes}


def set_ray_token(token: Path) -> None:
    """Has Ray, in this process and those that it starts, ask for the token in a file, and report nothing to its makers.
    Ray reads its environment when it is imported."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    quiet_ray()


def ray_token() -> str:
    """Where Ray finds its token: "RAY_AUTH_TOKEN", or a file; "" where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return str(path) if path.is_file() and path.stat().st_size else ""


def use_ray_token() -> None:
    """Has Ray show the token that `ray_token` finds."""
    os.environ["RAY_AUTH_MODE"] = "token"
    quiet_ray()


def quiet_ray() -> None:
    """No report to Ray's makers, no advice on the terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")


def for_rank(changes: Mapping[str, str], defaults: Mapping[str, str]) -> dict[str, str]:
    """`for_child` without the token of the cluster, which ranks have no use for."""
    return {name: value for name, value in for_child(changes, defaults).items() if name != "RAY_AUTH_TOKEN"}


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
