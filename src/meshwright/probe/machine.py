"""`machine`: measures the parts of a training step on this machine, with all ranks busy at once, for `calibrate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright import launch
from meshwright.cluster import available_cores
from meshwright.errors import CannotWork, Problem
from meshwright.nn import backend
from meshwright.plan.calibrate.from_machine import QUIET
from meshwright.probe import parts
from meshwright.probe.collectives import all_gather, all_reduce, reduce_scatter
from meshwright.process_group import process_group

#: All parts are measured in each round, and the best figure of each counts.
ROUNDS = 2
#: Share of the requested seconds for starting processes and measuring; the rest is for ending them.
MEASURED_SHARE = 0.93
#: Time limit on a busy machine: this multiple of the requested seconds, but at least the second figure, and at most the
#: third, which leaves time to end the processes within five minutes.
TIMEOUT_FACTOR, LEAST_SECONDS, MOST_SECONDS = 3.0, 120.0, 287.0
#: Bytes of the whole tensor.
MESSAGES = {"cpu": (8, 1 << 20, 1 << 22, 1 << 24), "cuda": (8, 1 << 16, 1 << 20, 1 << 24, 1 << 28)}
REPEATS = {8: 30}


def machine(seconds: float = 30.0, interface: str = "lo") -> dict[str, Any]:
    """Measurements of this machine, in about `seconds` of wall time, or in the time of one round if that is longer.

    {"kind", "ranks", "threads", "busy": medians over the ranks, measured by all ranks at once, "links": rows of
    collectives, "together": measured by one process with all cores (CPU only), "seconds"}. "busy" and "together" each
    have "processors", the share of its processors that a process got, the least of all ranks. Where it is below QUIET,
    "together" has no "chains", because they would show nothing about threads. Raises RunFailed when the processes
    cannot start or connect, CannotWork when they exceed the time limit.
    """
    began = time.monotonic()
    cuda = torch.cuda.is_available()
    ranks = torch.cuda.device_count() if cuda else available_cores()
    again = not cuda and ranks > 1
    payload = {"kind": "cuda" if cuda else "cpu", "began": began, "until": began + MEASURED_SHARE * seconds}
    limit_seconds = min(max(TIMEOUT_FACTOR * seconds, LEAST_SECONDS), MOST_SECONDS)
    answers = _run_ranks({**payload, "whole": True, "again": again}, ranks, limit_seconds, interface)
    figures: dict[str, Any] = {
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
        figures["together"] = {"threads": ranks, **alone["parts"], "processors": alone["processors"]}
    return {**figures, "seconds": round(time.monotonic() - began, 1)}


def _run_ranks(payload: dict[str, Any], ranks: int, limit_seconds: float, interface: str) -> list[dict[str, Any]]:
    """The results of `ranks` processes, which must end within `limit_seconds` of the probe's start."""
    threads = {"OMP_NUM_THREADS": str(max(1, available_cores() // ranks))}  # overrides the user's setting
    options: dict[str, Any] = {"interface": interface, "env": threads}
    with (
        launch.scratch_folder("meshwright-probe-") as folder,
        launch.local("meshwright.probe.machine:work", payload, ranks, folder, **options) as workers,
    ):
        try:
            return workers.wait(max(0.0, payload["began"] + limit_seconds - time.monotonic()))
        except TimeoutError as error:
            what = f"measuring did not end within {limit_seconds:.0f} s: the machine has other work, or very many cores"
            hint = "measure again when it is quiet, or allow more with --seconds, up to 300"
            raise CannotWork(Problem("calibrate machine", what, hint)) from error


class TimeBudget:
    """Gives each of `timings` measurements an equal part of the time left until `until` (of time.monotonic()), so that
    a delay shortens all later measurements."""

    def __init__(self, until: float, timings: int) -> None:
        self.until, self.timings = until, timings

    def __call__(self) -> float:
        """Seconds for the next measurement."""
        allowed = max(0.0, self.until - time.monotonic()) / max(1, self.timings)
        self.timings -= 1
        return allowed


def _time_budget(payload: dict[str, Any]) -> TimeBudget:
    """The budget of this process. Where another start of processes follows, it is assumed to take as long as this one,
    and the time that is left is divided by the number of measurements."""
    now, until = time.monotonic(), payload["until"]
    count = parts.timings(payload["kind"], payload["whole"])
    if payload["again"]:
        left = until - now - (now - payload["began"])
        until = now + left * count / (count + parts.timings(payload["kind"], False))
    return TimeBudget(until, ROUNDS * count)


def work(payload: dict[str, Any], context: launch.Context) -> dict[str, Any]:
    """The function of each process. payload: {kind, began, until, whole, again}. Without `whole` it measures only the
    parts that threads speed up; `again` means that another start follows. The longest parts come first, so that later
    ones can make up for a delay."""
    budget = _time_budget(payload)
    device = torch.device("cpu")
    if payload["kind"] == "cuda":
        device = torch.device("cuda", context.device)
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)
    with process_group(context, backend(device), timeout_seconds=MOST_SECONDS):
        own_time = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if own_time else time.perf_counter
        typical = statistics.median if payload["whole"] else min  # one thread without a core delays all threads
        bench = parts.Bench(device, budget, dist.barrier, clock, typical)
        links = _links(context.rank, context.world, device) if context.world > 1 else []
        figures = _measure_parts(bench, payload)
        for _ in range(ROUNDS - 1):
            late = torch.tensor(time.monotonic() > budget.until, dtype=torch.int32)
            dist.all_reduce(late, dist.ReduceOp.MAX)  # all ranks continue, or none
            if late.item():
                break
            figures = _best_figures(figures, _measure_parts(bench, payload))
        return {"parts": figures, "links": links, "processors": bench.processors()}


def _measure_parts(bench: parts.Bench, payload: dict[str, Any]) -> dict[str, Any]:
    """One round of all parts."""
    figures: dict[str, Any] = {}
    if payload["whole"]:
        figures |= {
            "layers": parts.layers(bench, parts.one_rank_mesh(payload["kind"])),
            "optimizer": parts.optimizer(bench),
            "read_bytes_per_second": parts.memory(bench),
            "losses": parts.losses(bench),
            "attention": parts.attention(bench),
        }
    figures["products"] = parts.products(bench)
    if payload["whole"] or bench.processors() >= QUIET:
        figures["chains"] = parts.chains(bench)
    return figures


def _best_figures(first: Any, second: Any, speed: bool = False) -> Any:
    """The best of every figure of two rounds: the shorter time, the higher speed. Work of other guests on the same
    hardware is temporary, and does not show in the share of the processors."""
    if isinstance(first, dict):
        return {
            key: _best_figures(value, second[key], key.endswith("_per_second"))
            if key in first and key in second
            else value
            for key, value in {**second, **first}.items()
        }
    if isinstance(first, list):
        return [_best_figures(*pair) for pair in zip(first, second, strict=True)]
    if isinstance(first, int | float):
        return max(first, second) if speed else min(first, second)
    return first


def _links(rank: int, world: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each collective by size, called as in training: the lower quartile of the repeats."""
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
            seconds = _lower_quartile(call, device, REPEATS.get(size, 8))
            rows.append({"collective": name, "ranks": world, "bytes": elements * 4, "seconds": seconds})
    return rows


def _send_receive(tensor: Tensor, rank: int) -> None:
    """Rank 0 sends to rank 1; the others do nothing."""
    if rank == 0:
        dist.send(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)


def _lower_quartile(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of `call`, after two warm-ups."""
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
    """The same nested lists and dicts with the median over the ranks for every float."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _medians([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_medians(list(rows)) for rows in zip(*answers, strict=True)]
    return statistics.median(answers) if isinstance(first, float) else first
