"""Random pins give a plan that keeps them all, or an error whose suggestions all work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshwright.cluster import Cluster, Device, Link, named_cluster
from meshwright.errors import CannotWork, Problem
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import SCHEDULES
from meshwright.plan import PlanRequest, make_plan

SMALL = card(LlamaShape(layers=4, hidden=48, heads=12, kv_heads=4, head_dim=4, ffn=96, vocab=240), 64)
LLAMA = card(LlamaShape(6, 4096, 32, 8, 128, 14336, 128256), 8192)


def cores(devices: int, mebibytes: int = 4096) -> Cluster:
    device = Device("core", "cpu", mebibytes * 2**20, {"fp32": 80e9, "bf16": 300e9}, 30e9, 6e-6)
    link = Link("gloo", 1e9, 0.3e-3)
    return Cluster(device, devices, devices, link, link)


def suggested(problem: Problem) -> dict[str, Any]:
    """The changes after "nearest: ": fields of the layout, "devices", "global_batch"."""
    values: dict[str, Any] = {}
    for key, text in re.findall(r"(?:layout|train|cluster)\.(\w+)=(\S+)", problem.nearest):
        values[key] = {"true": True, "false": False}.get(text, int(text) if text.lstrip("-").isdigit() else text)
    if found := re.search(r"(\d+) such devices", problem.nearest):
        values["devices"] = int(found[1])
    return values


def follow(problem: Problem, devices: int, request: PlanRequest, mebibytes: int = 4096) -> None:
    """Plans with the problem's suggestion; raises what that plan raises."""
    change = suggested(problem)
    assert change, f"no change is suggested: {problem}"
    devices, batch = change.pop("devices", devices), change.pop("global_batch", request.global_batch)
    grown = cores(devices, mebibytes)
    make_plan(SMALL, grown, replace(request, global_batch=batch, pins=change))


PINS = st.fixed_dictionaries(
    {},
    optional={
        "dp": st.integers(1, 6),
        "shard": st.integers(1, 5),
        "tp": st.integers(1, 5),
        "pp": st.integers(1, 7),
        "cp": st.sampled_from([1, 2, 3, 64]),
        "ep": st.integers(1, 2),
        "vpp": st.integers(1, 3),
        "micro_batch": st.integers(1, 8),
        "sequence_parallel": st.booleans(),
        "schedule": st.sampled_from(SCHEDULES),
        "recompute": st.sampled_from(["none", "selective", "full"]),
        "offload": st.booleans(),
    },
)


@settings(max_examples=40)
@given(
    devices=st.sampled_from([1, 2, 3, 4, 6]),
    batch=st.sampled_from([1, 7, 8, 12]),
    pins=PINS,
    framework=st.sampled_from(["meshwright", "megatron-lm", "torchtitan", "llm-foundry"]),
)
@example(devices=1, batch=1, pins={"schedule": "interleaved"}, framework="megatron-lm")
def test_a_plan_keeps_all_pins_or_every_suggestion_plans(
    devices: int, batch: int, pins: dict[str, Any], framework: str
) -> None:
    request = PlanRequest(batch, "fp32", pins, framework=framework)
    try:
        plan = make_plan(SMALL, cores(devices), request)
    except CannotWork as error:
        for problem in error.problems:
            follow(problem, devices, request)
        return
    for choice in (plan.chosen, *plan.runners_up):
        assert all(getattr(choice.layout, name) == value for name, value in pins.items())


@pytest.mark.parametrize("pins", [{}, {"dp": 2}, {"dp": 4, "recompute": "none"}])
def test_too_little_memory_suggests_what_fits(pins: dict[str, Any]) -> None:
    request, mebibytes = PlanRequest(8, "fp32", pins), 545  # a process takes 450 MiB of it
    model = card(LlamaShape(layers=8, hidden=384, heads=8, kv_heads=8, head_dim=48, ffn=1024, vocab=4000), 256)
    with pytest.raises(CannotWork, match="does not fit") as caught:
        make_plan(model, cores(4, mebibytes), request)
    (problem,) = caught.value.problems
    change = suggested(problem)
    devices = change.pop("devices", 4)
    assert change or devices > 4
    make_plan(model, cores(devices, mebibytes), replace(request, pins=change))


@pytest.mark.parametrize(
    ("pins", "framework", "message"),
    [
        ({"tp": 2, "dp": 2, "pp": 4}, "meshwright", "dp2 x tp2 x pp4 x cp1 is 16, not 8 devices"),
        ({"ep": 2}, "meshwright", "ep=2: expert parallel is not offered yet by meshwright; plan for another framework"),
        ({"ep": 2}, "megatron-lm", "ep=2 spreads experts over devices, and this model has none"),
        ({"cp": 3}, "megatron-lm", "is 6, not 8 devices; cp=3 cuts a sequence into 6"),
        ({"vpp": 2, "pp": 1}, "megatron-lm", "vpp=2 cuts each stage of a pipeline, and pp is 1"),
        ({"vpp": 2, "pp": 2, "schedule": "1f1b"}, "megatron-lm", "schedule '1f1b' has vpp=1, not 2"),
        ({"schedule": "zbv", "pp": 2, "vpp": 2, "tp": 1}, "torchtitan", "wrong gradients without an error"),
        ({"offload": True}, "meshwright", "optimizer state in host memory is not offered yet by meshwright"),
        ({"schedule": "interleaved", "pp": 2}, "meshwright", "schedule 'interleaved' is not offered yet by meshwright"),
        ({"sequence_parallel": True, "tp": 1}, "megatron-lm", "sequence_parallel splits over tp, and tp is 1"),
    ],
)
def test_contradictions_by_name(pins: dict[str, Any], framework: str, message: str) -> None:
    cluster, request = named_cluster("h100-sxm-80gb", 8), PlanRequest(64, pins=pins, framework=framework)
    with pytest.raises(CannotWork) as caught:
        make_plan(LLAMA, cluster, request)
    assert message in str(caught.value)
    for problem in caught.value.problems:
        change = suggested(problem)
        assert change and all(name in pins for name in change)
        make_plan(LLAMA, cluster, replace(request, pins=change))
