"""`diagnose`: the hardware and software of this machine, its speeds, Meshwright's sockets, and the problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from meshwright.accelerators import gpus
from meshwright.cluster import GIB, available_cores, available_memory_bytes, cpu_cluster, memory_bytes, this_machine
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.job.sections import LaunchSection, ServeSection
from meshwright.nn import gpu_type
from meshwright.probe.sockets import listeners, socket_problems
from meshwright.probe.speeds import Speeds, measure

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
LOW_MEMORY_BYTES = 2 * GIB
LOW_DISK_BYTES = 2 * GIB
COMPILERS = ("g++", "clang++")
PACKAGES = ("torch", "ray", "safetensors", "tokenizers", "numpy", "pydantic", "grpcio", "transformers", "scikit-learn")


def diagnose(quick: bool = False) -> dict[str, Any]:
    """This machine as JSON; `quick` leaves out the measurements (a few seconds).

    Keys: meshwright, python, platform, packages {name: version or None}, cpu, memory, devices, cluster, disk, compiler,
    speeds (None if quick), sockets (with the default ports and interface) and problems [{where, what, nearest}]. Sizes
    are in bytes, rates per second. Problems are reported, never raised.
    """
    serve, launch = ServeSection(), LaunchSection()
    versions = {name: _version(name) for name in PACKAGES}
    memory = {"total_bytes": memory_bytes(), "available_bytes": available_memory_bytes()}
    disk, compiler = _disk(), _compiler()
    devices = _gpus_of_torch()
    problems = [
        *_version_problems(versions),
        *_memory_problems(memory, disk),
        *_compiler_problems(compiler),
        *socket_problems(serve, launch),
    ]
    cluster = ""
    try:
        machine = this_machine()
        cluster = str(machine)
        if not devices and (found := gpus()):
            what = (
                f"the machine has {len(found)} {found[0].name}, and this build of torch ({torch.__version__}) uses none"
            )
            problems.append(Problem("torch", what, f"install torch's {found[0].build} build"))
    except (InputError, CannotWork) as error:
        problems.extend(error.problems)
    speeds = None if quick else measure(interface=launch.interface)
    if speeds is not None:
        problems += [*speeds.problems, *_speed_problems(speeds)]
    return {
        "meshwright": _version("meshwright"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": versions,
        "cpu": _cpu(),
        "memory": memory,
        "devices": devices or [{"kind": "cpu", "name": "CPU core", "count": available_cores()}],
        "cluster": cluster,
        "disk": disk,
        "compiler": compiler,
        "speeds": None if speeds is None else speeds.as_dict(),
        "sockets": [asdict(listener) for listener in listeners(serve, launch)],
        "problems": [asdict(problem) for problem in problems],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    fields = _proc_fields(Path("/proc/cpuinfo"))
    flags = set(fields.get("flags", "").split())
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {
        "name": name,
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 2),
        "instructions": fast,
        "slow_bf16": cpu_cluster().device.slow_bf16,
    }


def _proc_fields(path: Path) -> dict[str, str]:
    """The "key: value" lines of a file of /proc, up to its first blank line; {} where it does not exist."""
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpus_of_torch() -> list[dict[str, Any]]:
    kind = gpu_type()
    if kind is None:
        return []
    module = torch.get_device_module(kind)
    devices = [module.get_device_properties(index) for index in range(module.device_count())]
    return [
        {"kind": kind, "name": device.name, "index": index, "memory_bytes": device.total_memory}
        for index, device in enumerate(devices)
    ]


def _disk() -> dict[str, Any]:
    places = {"here": os.getcwd(), "temporary": tempfile.gettempdir()}
    return {name: {"path": path, "free_bytes": shutil.disk_usage(path).free} for name, path in places.items()}


def _compiler() -> dict[str, Any]:
    """What torch.compile needs on a CPU: a C++ compiler, and Python's headers."""
    path = next(filter(None, map(shutil.which, COMPILERS)), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {"cpp": path, "python_headers": headers.exists(), "torch_compile": path is not None and headers.exists()}


def _version_problems(versions: Mapping[str, str | None]) -> list[Problem]:
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not OLDEST_TORCH <= numbers <= NEWEST_TORCH:
        what = f"version {torch.__version__} was never tested with Meshwright"
        return [Problem("torch", what, "pip install 'torch>=2.11,<=2.13.0'")]
    return []


def _memory_problems(memory: Mapping[str, int], disk: Mapping[str, Mapping[str, Any]]) -> list[Problem]:
    problems = []
    if (available := memory["available_bytes"]) < LOW_MEMORY_BYTES:
        problems.append(Problem("memory", f"only {available / GIB:.1f} GiB are free", "end other programs"))
    for place in disk.values():
        if place["free_bytes"] < LOW_DISK_BYTES:
            what = f"only {place['free_bytes'] / GIB:.1f} GiB are free: checkpoints may not fit"
            problems.append(Problem(place["path"], what, "free some space, or run in a folder of another disk"))
    return problems


def _compiler_problems(compiler: Mapping[str, Any]) -> list[Problem]:
    if compiler["cpp"] is None:
        what = "no C++ compiler: training on the CPU is not compiled, and slower for it"
        return [Problem("torch.compile", what, "install g++ (Debian: apt-get install g++)")]
    if not compiler["python_headers"]:
        what = "Python.h is missing: training on the CPU is not compiled, and slower for it"
        return [Problem("torch.compile", what, "install Python's headers (Debian: apt-get install python3-dev)")]
    return []


def _speed_problems(speeds: Speeds) -> list[Problem]:
    load = os.getloadavg()[0]
    cores = available_cores()
    if load > 1.5 * cores:
        what = f"the machine is busy (load {load:.1f} on {cores} cores): the speeds above are too low"
        return [Problem("speeds", what, "measure again when it is quiet")]
    return []
