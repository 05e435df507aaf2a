"""The walk with its shortcuts gives the best of an estimate of every layout."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshwright.cluster import Cluster, Device, Link
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import FRAMEWORKS, Workload
from meshwright.plan.cost import Estimator, usable_bytes
from meshwright.plan.search import Space
from meshwright.plan.search.space import NARROW, WHOLE, degrees_of, layouts
from meshwright.plan.search.walk import CUTOFF, TIE, all_estimates, explore, ranked, search

MODEL = card(LlamaShape(layers=6, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=512, vocab=1024), 128)
GPU = {"fp32": 60e12, "bf16": 400e12}


def space_of(devices: int, per_node: int, batch: int, mebibytes: int, framework: str, **pins: Any) -> Space:
    device = Device("gpu", "cuda", mebibytes * 2**20, GPU, 2e12, 6e-6)
    cluster = Cluster(device, devices, per_node, Link("nvlink", 200e9, 8e-6), Link("network", 20e9, 15e-6))
    return Space(Workload(MODEL, cluster, batch, "bf16", FRAMEWORKS[framework]), pins)


def estimator_of(space: Space) -> Estimator:
    return Estimator(space.workload)


@settings(max_examples=30)
@example(nodes=1, per_node=8, batch=8, mebibytes=1046, framework="torchtitan", pins={"cp": 1, "pp": 2, "tp": 4})
@example(nodes=2, per_node=4, batch=32, mebibytes=1078, framework="megatron-lm", pins={"cp": 1})
@given(
    nodes=st.sampled_from([1, 2, 4]),
    per_node=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([8, 24, 32]),
    mebibytes=st.integers(950, 1400),
    framework=st.sampled_from(["meshwright", "megatron-lm", "torchtitan"]),
    pins=st.fixed_dictionaries(
        {"cp": st.just(1)},
        optional={"pp": st.sampled_from([1, 2]), "tp": st.sampled_from([1, 2]), "recompute": st.just("none")},
    ),
)
def test_no_shortcut_costs_the_best_layout(
    nodes: int, per_node: int, batch: int, mebibytes: int, framework: str, pins: dict[str, Any]
) -> None:
    space = space_of(nodes * per_node, per_node, batch, mebibytes, framework, **pins)
    room, estimator = usable_bytes(space.workload.cluster.device), estimator_of(space)
    everything = list(all_estimates(space, estimator))
    fitting = [estimate for estimate in everything if estimate.peak_bytes <= room]
    result = explore(space, estimator)
    assert bool(result.fitting) == bool(fitting)
    if fitting:
        best = min(estimate.step_seconds for estimate in fitting)
        assert min(estimate.step_seconds for estimate in result.fitting) == best
        assert ranked(result.fitting)[0].step_seconds <= best * (1 + TIE)
    assert all(estimate.peak_bytes <= room for estimate in result.fitting)
    assert result.counts.get("space", 0) == len(everything)


def test_a_layout_is_only_left_out_where_its_arithmetic_alone_is_slower() -> None:
    space = space_of(4, 4, 64, 4000, "meshwright")
    estimator = estimator_of(space)
    result = explore(space, estimator)
    assert result.counts["pruned"] > 0
    degree_sets = {degrees_of(e.layout) for e in result.fitting}
    best = min(e.step_seconds for e in result.fitting)
    for layout in layouts(space):
        estimate = estimator.estimate(layout)
        if estimate.step_seconds < CUTOFF * best and estimate.peak_bytes <= usable_bytes(space.workload.cluster.device):
            assert degrees_of(layout) in degree_sets


def test_equal_searches_find_equal_things() -> None:
    space = space_of(8, 4, 32, 1100, "megatron-lm")

    first, second = (search(space, estimator_of(space)) for _ in range(2))
    assert [e.layout for e in first.fitting] == [e.layout for e in second.fitting]
    assert first.counts == second.counts and first.too_large == second.too_large


def test_bounds_lose_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large space, searched within bounds and then refined, gives a layout within a tie of the whole space's best."""
    space = space_of(32, 8, 64, 1200, "megatron-lm", recompute="none")
    whole = ranked(explore(space, estimator_of(space)).fitting)[0]
    monkeypatch.setattr("meshwright.plan.search.walk.MOST_LAYOUTS", {"whole": 1, "usual": 1})
    result = search(space, estimator_of(space))
    assert result.bounds is NARROW and space.bounds is WHOLE
    assert ranked(result.fitting)[0].step_seconds <= whole.step_seconds * (1 + 2 * TIE)
