"""`machine`: measures what training on this machine is made of, with every rank busy at once, for `calibrate`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright import launch
from meshwright.cluster import available_cores
from meshwright.probe import parts
from meshwright.probe.collectives import all_gather, all_reduce, reduce_scatter

TIMEOUT_SECONDS = 330.0
#: Bytes of the whole tensor.
MESSAGES = {"cpu": (8, 1 << 20, 1 << 22, 1 << 24), "cuda": (8, 1 << 16, 1 << 20, 1 << 24, 1 << 28)}
REPEATS = {8: 30}
#: Measurements that share the time, roughly: what `seconds` is divided by.
TIMINGS = 130


def machine(seconds: float = 30.0, interface: str = "lo") -> dict[str, Any]:
    """Raw figures of this machine, taking about `seconds` and two starts of processes.

    {"kind", "ranks", "threads", "busy": what every rank measured while all were (medians over the ranks), "links": rows
    of collectives, "together": what one process with all cores measured (CPU only), "seconds"}. Raises RunFailed when
    the processes cannot start or talk.
    """
    began = time.perf_counter()
    cuda = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if cuda else available_cores()
    each = max(0.002, seconds / TIMINGS)
    payload = {"kind": "cuda" if cuda else "cpu", "seconds_each": each, "whole": True}
    answers = _started(payload, ranks, interface)
    found: dict[str, Any] = {
        "kind": payload["kind"],
        "ranks": ranks,
        "threads": 1,
        "busy": _middle([answer["parts"] for answer in answers]),
        "links": answers[0]["links"],
        "together": None,
    }
    if not cuda and ranks > 1:
        alone = _started({**payload, "whole": False}, 1, interface)[0]
        found["together"] = {"threads": ranks, **alone["parts"]}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def _started(payload: dict[str, Any], ranks: int, interface: str) -> list[dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory(prefix="meshwright-probe-") as folder,
        launch.local("meshwright.probe.machine:work", payload, ranks, folder, interface=interface) as started,
    ):
        return started.wait(TIMEOUT_SECONDS)


def work(payload: dict[str, Any], context: launch.Context) -> dict[str, Any]:
    """What each process does. payload: {kind, seconds_each, whole}; without `whole` only what threads speed up."""
    device = torch.device("cpu")
    if payload["kind"] == "cuda":
        device = torch.device("cuda", context.rank)
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if payload["kind"] == "cuda" else "gloo",
        store=dist.FileStore(str(context.store_path), context.world),
        rank=context.rank,
        world_size=context.world,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        own_time = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if own_time else time.perf_counter
        typical = statistics.median if payload["whole"] else min  # a thread that waits for its core holds all up
        bench = parts.Bench(device, payload["seconds_each"], dist.barrier, clock, typical)
        found: dict[str, Any] = {"products": parts.products(bench), "chains": parts.chains(bench)}
        if payload["whole"]:
            found |= {
                "attention": parts.attention(bench),
                "losses": parts.losses(bench),
                "read_bytes_per_second": parts.memory(bench),
                "optimizer": parts.optimizer(bench),
                "layers": parts.layers(bench, parts.one_rank_mesh(payload["kind"])),
            }
        links = _links(context.rank, context.world, device) if payload["whole"] and context.world > 1 else []
        return {"parts": found, "links": links}
    finally:
        dist.destroy_process_group()


def _links(rank: int, world: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each collective by size, as training calls it; the lower quartile of repeats that every rank makes."""
    group = dist.group.WORLD
    rows = []
    for size in MESSAGES[device.type]:
        elements = max(size // 4, world) // world * world
        whole, part = torch.zeros(elements, device=device), torch.zeros(elements // world, device=device)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(all_reduce, whole, group),
            "all_gather": partial(all_gather, part, group),
            "reduce_scatter": partial(reduce_scatter, whole, group),
            "point_to_point": partial(_pass_on, whole, rank),
        }
        for name, call in calls.items():
            rows.append(
                {
                    "collective": name,
                    "ranks": world,
                    "bytes": elements * 4,
                    "seconds": _timed(call, device, REPEATS.get(size, 8)),
                }
            )
    return rows


def _pass_on(tensor: Tensor, rank: int) -> None:
    """Rank 0 sends to rank 1; the others look on."""
    if rank == 0:
        dist.send(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)


def _timed(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times[2:], n=4)[0]


def _middle(answers: list[Any]) -> Any:
    """The same nest of lists and tables with the median over the ranks in place of every number."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _middle([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_middle(list(rows)) for rows in zip(*answers, strict=True)]
    return statistics.median(answers) if isinstance(first, float) else first
