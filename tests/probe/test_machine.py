"""The probe's parts give what its reader expects; how large the figures are is the machine's business."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from meshwright.cluster import cpu_cluster
from meshwright.plan.from_machine import machine_profile
from meshwright.plan.profile import DATASHEET
from meshwright.probe import machine, parts


def bench() -> parts.Bench:
    return parts.Bench(torch.device("cpu"), 0.0, lambda: None, time.process_time)


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
    timed = parts.Bench(torch.device("cpu"), 0.0, lambda: calls.append(0), lambda: next(clock))
    assert timed.seconds(lambda: calls.append(1)) == 2.0
    assert calls == [1, 1, 0, 1, 1, 1]


@pytest.mark.slow
def test_this_machine_makes_a_profile() -> None:
    raw = machine(seconds=2.0)
    assert raw["kind"] in ("cpu", "cuda")
    found = machine_profile(raw, cpu_cluster(), DATASHEET, "here")
    if raw["kind"] == "cpu":
        assert found["cpu.product.fp32.share"] != DATASHEET["cpu.product.fp32.share"]
        assert found["cpu.host.sharding.bf16.seconds"] > 0
    assert all(number >= 0 for number in numbers(raw["busy"]))
