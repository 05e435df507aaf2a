"""The generated space equals every combination filtered by the rules; bounds only take layouts away."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.card import Experts
from meshwright.cluster import Cluster, Device, Link
from meshwright.divisors import divisors
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import RECOMPUTE, SCHEDULES, Layout
from meshwright.plan import FRAMEWORKS, Workload, refusals
from meshwright.plan.search import Space
from meshwright.plan.search.space import NARROW, USUAL, WHOLE, layouts, size, with_micro_batch

MODEL = card(LlamaShape(layers=4, hidden=48, heads=12, kv_heads=4, head_dim=4, ffn=96, vocab=240), 64)
EXPERTS = Experts(count=4, top_k=1, ffn=96)
MIXTURE = replace(MODEL, blocks=tuple(replace(b, experts=EXPERTS) if b.attention else b for b in MODEL.blocks))


def space_of(devices: int, batch: int, pins: dict[str, Any], framework: str, per_node: int | None = None) -> Space:
    device = Device("core", "cpu", 2**33, {"fp32": 80e9, "bf16": 300e9}, 30e9, 6e-6)
    link = Link("gloo", 1e9, 0.3e-3)
    cluster = Cluster(device, devices, per_node or devices, link, link)
    return Space(Workload(MIXTURE, cluster, batch, "bf16", FRAMEWORKS[framework]), pins)


def filtered(space: Space) -> set[Layout]:
    """Every combination that no rule refuses; without a pipeline, only the first schedule counts."""
    devices, batch, pins = space.workload.cluster.devices, space.workload.global_batch, space.pins
    degrees, of = divisors(devices), space.values

    generated = set()
    for dp, tp, pp, cp in product(of("dp", degrees), of("tp", degrees), of("pp", degrees), of("cp", degrees)):
        if dp * tp * pp * cp != devices:
            continue
        for schedule in of("schedule", SCHEDULES if pp > 1 else ["1f1b"]):
            rest = product(of("shard", degrees), of("vpp", range(1, 7)), of("ep", [1, 2, 4]))
            for (shard, vpp, ep), on in product(rest, of("sequence_parallel", [False, True])):
                for micro in of("micro_batch", divisors(batch)):
                    layout = Layout(dp, shard, tp, pp, vpp, cp, ep, on, micro, schedule, pins["recompute"], False)
                    if not refusals(space.workload.query(layout)):
                        generated.add(layout)
    return generated


@settings(max_examples=15)
@given(
    devices=st.sampled_from([1, 2, 4, 6]),
    batch=st.sampled_from([1, 4, 6]),
    framework=st.sampled_from(["meshwright", "megatron-lm", "torchtitan", "llm-foundry"]),
    pins=st.fixed_dictionaries(
        {"recompute": st.just("none"), "offload": st.just(False)},
        optional={
            "dp": st.integers(0, 4),
            "tp": st.sampled_from([1, 2, 3]),
            "cp": st.sampled_from([1, 2]),
            "shard": st.integers(1, 3),
            "vpp": st.integers(1, 3),
            "ep": st.sampled_from([1, 2, 3]),
            "schedule": st.sampled_from([*SCHEDULES, "zigzag"]),
            "sequence_parallel": st.booleans(),
            "micro_batch": st.integers(1, 4),
        },
    ),
)
def test_the_space_is_what_the_rules_leave(devices: int, batch: int, framework: str, pins: dict[str, Any]) -> None:
    space = space_of(devices, batch, pins, framework)
    generated = list(layouts(space))
    assert len(generated) == len(set(generated)), "a layout came twice"
    assert set(generated) == filtered(space)


@pytest.mark.parametrize(("framework", "sizes"), [("meshwright", {1}), ("megatron-lm", {1, 2, 4})])
def test_a_padded_vocabulary_does_not_bound_tensor_parallelism(framework: str, sizes: set[int]) -> None:
    plain = space_of(4, 4, {"recompute": "none", "offload": False, "vpp": 1, "ep": 1}, framework)
    odd = LlamaShape(layers=4, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=50257)
    space = plain.with_workload(card=card(odd, 16))
    assert {layout.tp for layout in layouts(space)} == sizes
    assert set(layouts(space)) == filtered(space)


@pytest.mark.parametrize("bounds", [USUAL, NARROW])
def test_bounds_only_take_away_and_never_a_pin(bounds: Any) -> None:
    space = space_of(8, 12, {"recompute": "none"}, "megatron-lm", per_node=2)
    part = set(layouts(replace(space, bounds=bounds)))
    assert part < set(layouts(space))
    assert all(layout.tp <= 2 for layout in part)
    pinned = replace(space, pins={"tp": 4, "vpp": 1, "cp": 2}, bounds=bounds)
    assert {(layout.tp, layout.cp) for layout in layouts(pinned)} == {(4, 2)}


def test_recompute_and_offload_are_fields_too() -> None:
    generated = set(layouts(space_of(2, 4, {"dp": 2}, "megatron-lm")))
    assert {layout.recompute for layout in generated} == set(RECOMPUTE)
    assert {layout.offload for layout in generated} == {True, False}
    assert not any(layout.offload for layout in layouts(space_of(2, 4, {"dp": 2}, "meshwright")))


@pytest.mark.parametrize("framework", ["meshwright", "megatron-lm", "torchtitan"])
def test_the_size_is_an_upper_bound(framework: str) -> None:
    space = space_of(8, 12, {}, framework)
    assert sum(1 for _ in layouts(space)) <= size(space)
    assert size(space, stop=10) == 10
    assert space.bounds is WHOLE


def test_a_micro_batch_is_found_for_degrees_alone() -> None:
    space = space_of(4, 12, {}, "meshwright")
    assert with_micro_batch(space, Layout(dp=4)).micro_batch == 3
    assert with_micro_batch(space, Layout(pp=4)).schedule == "gpipe", "1f1b over four stages would take three at once"
    assert with_micro_batch(space, Layout(dp=5)) == Layout(dp=5)
