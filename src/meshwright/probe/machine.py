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
from meshwright.errors import CannotWork, Problem
from meshwright.plan.calibrate.from_machine import QUIET
from meshwright.probe import parts
from meshwright.probe.collectives import all_gather, all_reduce, reduce_scatter

#: All parts are measured so many times, one time after the other, and the better figure of each counts.
ROUNDS = 2
#: What is measured takes this share of the seconds asked for, starts of processes included; their end takes the rest.
MEASURED_SHARE = 0.93
#: A busy machine is waited for so many times as long as was asked for, or so many seconds if that is more, but never
#: longer than the last, which leaves time to end the processes within five minutes.
TIMEOUT_FACTOR, LEAST_SECONDS, MOST_SECONDS = 3.0, 120.0, 287.0
#: Bytes of the whole tensor.
MESSAGES = {"cpu": (8, 1 << 20, 1 << 22, 1 << 24), "cuda": (8, 1 << 16, 1 << 20, 1 << 24, 1 << 28)}
REPEATS = {8: 30}


def machine(seconds: float = 30.0, interface: str = "lo") -> dict[str, Any]:
    """Raw figures of this machine, in about `seconds` of the wall, or what one round of everything takes if that is
    more.

    {"kind", "ranks", "threads", "busy": what every rank measured while all were (medians over the ranks), "links": rows
    of collectives, "together": what one process with all cores measured (CPU only), "seconds"}. Under "busy" and
    "together" "processors" is the share of their processors that the processes got: the least of all ranks. Where that
    is less than QUIET, "together" has no "chains": it tells nothing of threads. Raises RunFailed when the processes
    cannot start or connect, CannotWork when they take far longer than asked for.
    """
    began = time.monotonic()
    cuda = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if cuda else available_cores()
    again = not cuda and ranks > 1
    payload = {"kind": "cuda" if cuda else "cpu", "began": began, "until": began + MEASURED_SHARE * seconds}
    limit_seconds = min(max(TIMEOUT_FACTOR * seconds, LEAST_SECONDS), MOST_SECONDS)
    answers = _run_ranks({**payload, "whole": True, "again": again}, ranks, limit_seconds, interface)
    found: dict[str, Any] = {
        "kind": payload["kind"],
        "ranks": ranks,
        "threads": 1,
        "busy": {
            **_medians([answer["parts"] for answer in answers]),
            "processors": min(answer["processors"] for answer in answers),
        },
        "links": answers[0]["links"],
        "together": None,
    }
    if again:
        alone = _run_ranks({**payload, "whole": False, "again": False}, 1, limit_seconds, interface)[0]
        found["together"] = {"threads": ranks, **alone["parts"], "processors": alone["processors"]}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def _run_ranks(payload: dict[str, Any], ranks: int, limit_seconds: float, interface: str) -> list[dict[str, Any]]:
    """The answers of `ranks` processes, waited for until `limit_seconds` after the probe began."""
    threads = {"OMP_NUM_THREADS": str(max(1, available_cores() // ranks))}  # whatever this process was told
    how: dict[str, Any] = {"interface": interface, "env": threads}
    with (
        tempfile.TemporaryDirectory(prefix="meshwright-probe-") as folder,
        launch.local("meshwright.probe.machine:work", payload, ranks, folder, **how) as started,
    ):
        try:
            return started.wait(max(0.0, payload["began"] + limit_seconds - time.monotonic()))
        except TimeoutError as error:
            what = f"measuring did not end within {limit_seconds:.0f} s: the machine has other work, or very many cores"
            hint = "measure again when it is quiet, or allow more with --seconds, up to 300"
            raise CannotWork(Problem("calibrate machine", what, hint)) from error


class TimeBudget:
    """Allows each of `timings` measurements an equal part of what is left until `until`, of the machine's
    time.monotonic(): what is late, or started late, shortens the rest."""

    def __init__(self, until: float, timings: int) -> None:
        self.until, self.timings = until, timings

    def __call__(self) -> float:
        """Seconds of the next measurement."""
        allowed = max(0.0, self.until - time.monotonic()) / max(1, self.timings)
        self.timings -= 1
        return allowed


def _time_budget(payload: dict[str, Any]) -> TimeBudget:
    """Where the probe starts processes again, it is supposed to take as long as this start, and the rest is shared."""
    now, until = time.monotonic(), payload["until"]
    mine = parts.timings(payload["kind"], payload["whole"])
    if payload["again"]:
        left = until - now - (now - payload["began"])
        until = now + left * mine / (mine + parts.timings(payload["kind"], False))
    return TimeBudget(until, ROUNDS * mine)


def work(payload: dict[str, Any], context: launch.Context) -> dict[str, Any]:
    """What each process does. payload: {kind, began, until, whole, again}; without `whole` only what threads speed up;
    `again` where another start follows. What takes longest is measured first, so that the rest can make up for it."""
    budget = _time_budget(payload)
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
        timeout=timedelta(seconds=MOST_SECONDS),
    )
    try:
        own_time = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if own_time else time.perf_counter
        typical = statistics.median if payload["whole"] else min  # a thread that waits for its core holds all up
        bench = parts.Bench(device, budget, dist.barrier, clock, typical)
        links = _links(context.rank, context.world, device) if context.world > 1 else []
        found = _parts(bench, payload)
        for _ in range(ROUNDS - 1):
            late = torch.tensor(time.monotonic() > budget.until, dtype=torch.int32)
            dist.all_reduce(late, dist.ReduceOp.MAX)  # all ranks go on, or none
            if late.item():
                break
            found = _better(found, _parts(bench, payload))
        return {"parts": found, "links": links, "processors": statistics.median(bench.shares or [1.0])}
    finally:
        dist.destroy_process_group()


def _parts(bench: parts.Bench, payload: dict[str, Any]) -> dict[str, Any]:
    """Every part, measured once."""
    found: dict[str, Any] = {}
    if payload["whole"]:
        found |= {
            "layers": parts.layers(bench, parts.one_rank_mesh(payload["kind"])),
            "optimizer": parts.optimizer(bench),
            "read_bytes_per_second": parts.memory(bench),
            "losses": parts.losses(bench),
            "attention": parts.attention(bench),
        }
    found["products"] = parts.products(bench)
    if payload["whole"] or statistics.median(bench.shares) >= QUIET:
        found["chains"] = parts.chains(bench)
    return found


def _better(one: Any, other: Any, speed: bool = False) -> Any:
    """Of two rounds the better of every figure: the shorter time, the greater speed. What a machine's hardware does for
    others shows in no share of the processors, and passes."""
    if isinstance(one, dict):
        whole = {**other, **one}
        return {
            key: _better(value, other[key], key.endswith("_per_second")) if key in one and key in other else value
            for key, value in whole.items()
        }
    if isinstance(one, list):
        return [_better(*pair) for pair in zip(one, other, strict=True)]
    if isinstance(one, int | float):
        return max(one, other) if speed else min(one, other)
    return one


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
            "point_to_point": partial(_send_receive, whole, rank),
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


def _send_receive(tensor: Tensor, rank: int) -> None:
    """Rank 0 sends to rank 1; the others do nothing."""
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


def _medians(answers: list[Any]) -> Any:
    """The same nest of lists and tables with the median over the ranks in place of every number."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _medians([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_medians(list(rows)) for rows in zip(*answers, strict=True)]
    return statistics.median(answers) if isinstance(first, float) else first
