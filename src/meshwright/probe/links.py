"""Speed of the links between processes of this machine: bandwidth and latency of the collectives training uses."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meshwright import launch

MIB = 1024**2
MESSAGE_BYTES = 16 * MIB
TIMEOUT_SECONDS = 60.0
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class LinkSpeed:
    """`collective` over `processes` processes through `backend`.

    `latency_seconds`: of 8 bytes a process. `bytes_per_second`: bytes of the whole tensor (every process's part
    together) over seconds, at `message_bytes`.
    """

    backend: str
    collective: str
    processes: int
    latency_seconds: float
    message_bytes: int
    bytes_per_second: float


def measure_links(processes: int, interface: str, seconds_each: float) -> tuple[LinkSpeed, ...]:
    """Start `processes` local processes and time their collectives: NCCL with a GPU for each, gloo otherwise.

    Raises RunFailed when the processes cannot connect (there is no such interface, say).
    """
    backend = "nccl" if torch.cuda.device_count() >= processes else "gloo"
    payload = {"backend": backend, "seconds_each": seconds_each}
    with tempfile.TemporaryDirectory(prefix="meshwright-probe-") as folder:
        how: dict[str, Any] = {"env": {"OMP_NUM_THREADS": "1"}, "interface": interface}
        with launch.local("meshwright.probe.links:work", payload, processes, folder, **how) as started:
            rows = started.wait(TIMEOUT_SECONDS)[0]
    return tuple(LinkSpeed(**row) for row in rows)


def work(payload: dict[str, Any], context: launch.Context) -> list[dict[str, Any]]:
    """What each process does. payload: {backend, seconds_each}; returns a LinkSpeed's fields per collective."""
    backend = payload["backend"]
    device = torch.device("cuda", context.rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(context.store_path), context.world),
        rank=context.rank,
        world_size=context.world,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        rows = []
        for collective in COLLECTIVES:
            small = _times(collective, 2 * context.world, context.world, device, repeats=20)
            # Every process must do as many rounds as the others, so the count is not by each one's own clock.
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
    finally:
        dist.destroy_process_group()


def _times(collective: str, elements: int, world: int, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repetition after two to warm up, over a tensor of `elements` fp32 (all ranks' parts together)."""
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
