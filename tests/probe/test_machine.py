"""The probe's parts give what its reader expects; how large the figures are is the machine's business."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from meshwright.cluster import available_cores, cpu_cluster
from meshwright.errors import CannotWork
from meshwright.plan.calibrate import machine_profile
from meshwright.plan.calibrate.from_machine import INTERVAL, disturbances
from meshwright.plan.constants import DATASHEET
from meshwright.probe import machine, parts

probe = import_module("meshwright.probe.machine")


def bench(allowed: float = 0.0) -> parts.Bench:
    return parts.Bench(torch.device("cpu"), lambda: allowed, lambda: None, time.process_time)


def numbers(nest: Any) -> list[float]:
    if isinstance(nest, dict):
        return [number for value in nest.values() for number in numbers(value)]
    if isinstance(nest, list | tuple):
        return [number for value in nest for number in numbers(value)]
    return [nest] if isinstance(nest, int | float) else []


@pytest.mark.parametrize("part", [parts.products, parts.attention, parts.chains, parts.losses])
def test_a_part_is_rows_of_seconds_for_both_precisions(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PRODUCTS", {"cpu": ((16, 32, 32),)})
    monkeypatch.setattr(parts, "ATTENTION", {"cpu": ((1, 16, 2, 1, 8),)})
    monkeypatch.setattr(parts, "CHAINS", {"cpu": ((64, 128, 4096),)})
    monkeypatch.setattr(parts, "LOSSES", {"cpu": ((8, 64),)})
    rows = part(bench())
    assert {row["precision"] for row in rows} == {"fp32", "bf16"}
    assert all(math.isfinite(number) and number > 0 for number in numbers(rows))


def test_a_measurement_is_a_median_after_two_warm_ups() -> None:
    calls: list[int] = []
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    timed = parts.Bench(torch.device("cpu"), lambda: 1e-9, lambda: calls.append(0), lambda: next(clock))
    assert timed.seconds(lambda: calls.append(1)) == 2.0
    assert calls == [1, 1, 0, 1, 1, 1]


def test_a_late_measurement_is_made_once() -> None:
    calls: list[int] = []
    bench(0.0).seconds(lambda: calls.append(1), least=5)
    assert len(calls) == 3


def test_a_measurement_ends_by_the_wall_and_tells_the_share_of_the_processors_it_got() -> None:
    """A process that sleeps gets none of them and spends none of its own time."""
    timed, began = bench(0.2), time.perf_counter()
    assert timed.seconds(lambda: time.sleep(0.01)) < 0.005
    assert 0.2 <= time.perf_counter() - began < 1.0
    assert timed.processors() < 0.5


@pytest.mark.parametrize("whole", [True, False])
def test_the_parts_take_as_many_measurements_as_they_say(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    calls: list[int] = []

    def counted(self: parts.Bench, work: Any, least: int = 3) -> float:
        calls.append(least)
        return 1.0

    monkeypatch.setattr(parts.Bench, "seconds", counted)
    monkeypatch.setattr(parts, "_sharded", lambda *_: torch.nn.ModuleList())
    names = ("products", "chains", *(("attention", "losses", "memory", "optimizer") if whole else ()))
    for name in names:
        getattr(parts, name)(bench())
    if whole:
        parts.layers(bench(), None)  # type: ignore[arg-type]
    assert len(calls) == parts.timings("cpu", whole)


def test_what_is_late_shortens_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = probe.TimeBudget(110.0, 4)
    assert pace() == 2.5
    now[0] = 107.0
    assert pace() == 1.0
    now[0] = 111.0
    assert pace() == 0.0 and pace() == 0.0 and pace() == 0.0


def test_the_starts_come_off_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 s from 100 on, the first start took 4, and the second is supposed to."""
    monkeypatch.setattr(time, "monotonic", lambda: 104.0)
    payload = {"kind": "cpu", "began": 100.0, "until": 130.0}
    whole, rest = parts.timings("cpu", True), parts.timings("cpu", False)
    first = probe._time_budget({**payload, "whole": True, "again": True})
    assert first.until == pytest.approx(104 + 22 * whole / (whole + rest)) and first.timings == probe.ROUNDS * whole
    assert probe._time_budget({**payload, "whole": False, "again": False}).until == 130.0


def test_processes_that_do_not_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LEAST_SECONDS", 0.2)
    with pytest.raises(CannotWork, match=r"did not end within 0 s.*; measure again when it is quiet"):
        machine(seconds=0.01)
    assert max(probe.TIMEOUT_FACTOR * 300, probe.LEAST_SECONDS) > probe.MOST_SECONDS  # what holds for `--seconds 300`
    assert probe.MOST_SECONDS + 5 < 300


def test_the_better_figure_of_two_rounds_counts() -> None:
    one = {
        "products": [{"precision": "fp32", "forward": 2.0, "rows": 4}],
        "read_bytes_per_second": 5.0,
        "chains": [1.0],
    }
    other = {"products": [{"precision": "fp32", "forward": 1.0, "rows": 4}], "read_bytes_per_second": 9.0}
    best = {
        "products": [{"precision": "fp32", "forward": 1.0, "rows": 4}],
        "read_bytes_per_second": 9.0,
        "chains": [1.0],
    }
    assert probe._best_figures(one, other) == probe._best_figures(other, one) == best


@pytest.fixture
def neighbours() -> Iterator[None]:
    """Other processes that want every core of this machine, as much as the probe's own do: in sessions of their own."""
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop, start_new_session=True) for _ in range(2 * available_cores())]
    yield
    for process in loops:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() or available_cores() < 2, reason="threads are a matter of CPU cores")
@pytest.mark.usefixtures("neighbours")
def test_a_busy_machine_says_so_and_keeps_what_threads_add() -> None:
    raw = machine(seconds=2.0)
    assert max(raw["busy"]["processors"], raw["together"]["processors"]) < 0.9
    start = DATASHEET.changed({"cpu.threads.product_share": 0.83, "cpu.threads.memory_share": 0.61})
    found = machine_profile(raw, cpu_cluster(), start, "here")
    assert (found["cpu.threads.product_share"], found["cpu.threads.memory_share"]) == (0.83, 0.61)
    assert len(disturbances(raw)) == 2
    assert found.interval("cpu")[0] == pytest.approx(raw["busy"]["processors"] * INTERVAL[0])


@pytest.mark.slow
def test_this_machine_makes_a_profile() -> None:
    raw = machine(seconds=2.0)
    assert raw["kind"] in ("cpu", "cuda")
    found = machine_profile(raw, cpu_cluster(), DATASHEET, "here")
    if raw["kind"] == "cpu":
        assert found["cpu.product.fp32.share"] != DATASHEET["cpu.product.fp32.share"]
        assert found["cpu.host.sharding.bf16.seconds"] > 0
    assert all(number >= 0 for number in numbers(raw["busy"]))
