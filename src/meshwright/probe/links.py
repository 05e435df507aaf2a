"""Bandwidth and latency of the collectives of training, between processes of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from meshwright import launch
from meshwright.process_group import process_group

MIB = 1024**2
MESSAGE_BYTES = 16 * MIB
TIMEOUT_SECONDS = 60.0
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class LinkSpeed:
    """`collective` over `processes` processes through `backend`.

    `latency_seconds` is the time for 8 bytes per process. `bytes_per_second` is `message_bytes`, the size of the whole
    tensor (the parts of all processes together), over its time.
    """

    backend: str
    collective: str
    processes: int
    latency_seconds: float
    message_bytes: int
    bytes_per_second: float


def measure_links(processes: int, interface: str) -> tuple[LinkSpeed, ...]:
    """Start `processes` local processes and time their collectives: NCCL with a GPU per process, else gloo.

    Raises InputError where there is no such interface, and RunFailed when the processes cannot connect.
    """
    backend = "nccl" if torch.cuda.device_count() >= processes else "gloo"
    payload = {"backend": backend}
    with launch.scratch_folder("meshwright-probe-") as folder:
        options: dict[str, Any] = {"env": {"OMP_NUM_THREADS": "1"}, "interface": interface}
        with launch.local("meshwright.probe.links:work", payload, processes, folder, **options) as workers:
            rows = workers.wait(TIMEOUT_SECONDS)[0]
    return tuple(LinkSpeed(**row) for row in rows)


def work(payload: dict[str, Any], context: launch.Context) -> list[dict[str, Any]]:
    """The function of each process. payload: {backend}. Returns the fields of a LinkSpeed per collective."""
    backend = payload["backend"]
    device = torch.device("cuda", context.device) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(context, backend, timeout_seconds=TIMEOUT_SECONDS):
        rows = []
        for collective in COLLECTIVES:
            small = _times(collective, 2 * context.world, context.world, device, repeats=20)
            # All processes must do the same number of repeats, so it cannot depend on their clocks.
            large_elements = MESSAGE_BYTES // 4 // context.world * context.world
            large = _times(collective, large_elements, context.world, device, repeats=4)
            row = LinkSpeed(
                backend=backend,
                collective=collective,
                processes=context.world,
                latency_seconds=statistics.median(small),
                message_bytes=large_elements * 4,
                bytes_per_second=large_elements * 4 / min(large),
            )
            rows.append(row.__dict__)
        return rows


def _times(collective: str, elements: int, world: int, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat, after two for warm-up, with a tensor of `elements` fp32 (the parts of all ranks)."""
    whole = torch.zeros(elements, device=device)
    part = torch.zeros(elements // world, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        calls[collective]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[2:]
