"""A cluster of several kinds is never slower than its best group alone; shares add up, stages fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.card import Card
from meshwright.cluster import Cluster, Device, Link, named_cluster
from meshwright.errors import CannotWork, InputError
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import Plan, PlanRequest, Workload, make_plan
from meshwright.plan.cost import usable_bytes
from meshwright.plan.mixed import MixedCluster, make_mixed_plan
from meshwright.plan.mixed.cluster import MixedChoice, MixedWorkload
from meshwright.plan.mixed.pipeline import best_pipeline
from meshwright.plan.mixed.ways import best_batch_split
from meshwright.plan.search.walk import TIE
from meshwright.report.lines import cost_line

MODEL = card(LlamaShape(layers=6, hidden=1024, heads=16, kv_heads=8, head_dim=64, ffn=2816, vocab=8192), 1024)
BIG = card(LlamaShape(12, 4096, 32, 8, 128, 11008, 32000), 4096)


def group(name: str, devices: int, speed: float, gibibytes: float) -> Cluster:
    flops = {"fp32": 20e12 * speed, "bf16": 300e12 * speed}
    device = Device(name, "cuda", int(gibibytes * 2**30), flops, 2e12 * speed, 6e-6)
    return Cluster(device, devices, devices, Link("nvlink", 200e9, 2e-6), Link("network", 25e9, 1e-5))


def both(speed: float = 2.0, first: int = 4, second: int = 4, gibibytes: float = 40.0) -> MixedCluster:
    return MixedCluster((group("slow", first, 1.0, gibibytes), group("quick", second, speed, gibibytes)))


def workload(mixed: MixedCluster, batch: int = 64, model: Card = MODEL) -> MixedWorkload:
    return MixedWorkload(Workload(model, mixed.slowest, batch, "bf16"), mixed, PlanRequest(batch), None)


def blocks_of(way: MixedChoice) -> dict[str, int]:
    """The number of blocks of each group."""
    return {s.group: sum(map(len, way.choice.stages[s.first_stage : s.stop_stage])) for s in way.shares}


@settings(max_examples=6)
@given(
    speed=st.floats(1.0, 4.0),
    first=st.sampled_from([1, 2, 4]),
    second=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([16, 48]),
    gibibytes=st.sampled_from([4.0, 8.0, 40.0]),
)
def test_never_slower_than_the_best_group_alone(
    speed: float, first: int, second: int, batch: int, gibibytes: float
) -> None:
    mixed, request = both(speed, first, second, gibibytes), PlanRequest(batch)
    alone = []
    for one in mixed.groups:
        try:
            alone.append(make_plan(MODEL, one, request, what_if=False).chosen.predicted.step_seconds.mid)
        except CannotWork:
            continue
    try:
        plan = make_mixed_plan(MODEL, mixed, request)
    except CannotWork:
        assert not alone
        return
    step = plan.chosen.predicted.step_seconds.mid
    assert all(step <= seconds * (1 + TIE) for seconds in alone)
    assert [share.group for share in plan.shares] == ["slow", "quick"]
    assert [share.devices for share in plan.shares] == [first, second]
    if plan.chosen.why.startswith("shares of the batch"):
        assert sum(share.samples for share in plan.shares) == batch
    if plan.chosen.why.startswith("stages"):
        spans = sorted((share.first_stage, share.stop_stage) for share in plan.shares)
        assert spans[0][0] == 0 and spans[0][1] == spans[1][0] and spans[1][1] == plan.chosen.layout.pp
        assert [name for stage in plan.chosen.stages for name in stage] == [block.name for block in MODEL.blocks]
    rooms = [usable_bytes(one.device) for one in mixed.groups]
    assert all(share.peak_bytes <= room for share, room in zip(plan.shares, rooms, strict=True))
    assert 0 < plan.chosen.predicted.mfu < 1
    assert Plan.from_dict(json.loads(str(plan))) == plan


def test_samples_are_shared_by_throughput() -> None:
    way = best_batch_split(workload(both(speed=3.0), batch=64))
    assert way is not None
    slow, quick = way.shares
    assert slow.samples + quick.samples == 64
    assert 1.8 <= quick.samples / slow.samples <= 4, "three times as fast, less what does not grow with speed"
    equal = best_batch_split(workload(both(speed=1.0), batch=64))
    assert equal is not None and [share.samples for share in equal.shares] == [32, 32]


def test_stages_are_cut_by_throughput() -> None:
    way = best_pipeline(workload(both(speed=3.0), batch=64))
    assert way is not None
    blocks, stages = blocks_of(way), way.choice.stages
    assert blocks["quick"] > blocks["slow"] and sum(blocks.values()) == len(MODEL.blocks)
    assert len(stages) == way.choice.layout.pp and all(stages)


def test_a_small_device_gets_the_blocks_that_fit() -> None:
    small, large = group("small", 2, 2.0, 8.0), group("large", 2, 1.0, 80.0)
    way = best_pipeline(workload(MixedCluster((small, large)), batch=16, model=BIG))
    assert way is not None
    assert way.shares[0].peak_bytes <= usable_bytes(small.device)
    blocks = blocks_of(way)
    assert blocks["small"] < blocks["large"], "twice as fast, but without the room"


def test_equal_groups_are_about_one_cluster() -> None:
    """The pipeline through two groups of one kind is about that of one cluster."""
    mixed = both(speed=1.0)
    whole = replace(mixed.groups[0], devices=8)
    way = best_pipeline(workload(mixed, batch=64))
    assert way is not None
    pins = {name: getattr(way.choice.layout, name) for name in ("tp", "pp", "dp", "shard", "micro_batch", "recompute")}
    plan = make_plan(MODEL, whole, PlanRequest(64, pins={**pins, "schedule": way.choice.layout.schedule}))
    assert way.seconds == pytest.approx(plan.chosen.predicted.step_seconds.mid, rel=0.1)


def test_pins_are_kept_by_every_way() -> None:
    plan = make_mixed_plan(MODEL, both(), PlanRequest(64, pins={"tp": 2, "recompute": "full"}))
    for choice in (plan.chosen, *plan.runners_up):
        assert (choice.layout.tp, choice.layout.recompute) == (2, "full")


def test_the_others_are_runners_up_and_say_by_how_much_they_lose() -> None:
    plan = make_mixed_plan(MODEL, both(speed=1.3), PlanRequest(64))
    whys = " ".join(choice.why for choice in (plan.chosen, *plan.runners_up))
    assert "only slow" in whys and "all as the slowest" in whys
    assert all("slower" in choice.why for choice in plan.runners_up)
    assert plan.cluster == "4 x slow + 4 x quick"


def test_nothing_that_fits_says_so_for_each_group() -> None:
    with pytest.raises(CannotWork, match="does not fit") as caught:
        make_mixed_plan(BIG, both(gibibytes=8.0, first=1, second=1), PlanRequest(8))
    assert len(caught.value.problems) >= 2


def test_one_group_is_no_mixture() -> None:
    with pytest.raises(InputError, match="give 2 to 4"):
        MixedCluster((group("slow", 2, 1.0, 8.0),))


def test_money_weighs_prices_and_needs_them() -> None:
    cheap, dear = both(speed=1.5).groups
    mixed = MixedCluster((replace(cheap, dollars_per_hour=1.0), replace(dear, dollars_per_hour=9.0)))
    plan = make_mixed_plan(MODEL, mixed, PlanRequest(64, objective="money"))
    assert plan.chosen.why.startswith("only slow") and plan.shares[1].samples == 0
    assert any("quicker, and dearer" in choice.why for choice in plan.runners_up)
    with pytest.raises(InputError, match="no price of slow is known"):
        make_mixed_plan(MODEL, both(), PlanRequest(64, objective="money"))


def test_devices_of_the_table() -> None:
    mixed = MixedCluster((named_cluster("a100-sxm-80gb", 8), named_cluster("h100-sxm-80gb", 8)))
    plan = make_mixed_plan(BIG, mixed, PlanRequest(64, steps=1000))
    best = make_plan(BIG, mixed.groups[1], PlanRequest(64)).chosen.predicted.step_seconds.mid
    assert plan.chosen.predicted.step_seconds.mid < best
    assert plan.chosen.predicted.dollars is not None


def test_money_and_failures_of_several_kinds_are_those_that_are_said() -> None:
    mixed = MixedCluster(tuple(replace(g, dollars_per_hour=float(n)) for n, g in enumerate(both().groups, start=1)))
    usual = make_mixed_plan(MODEL, mixed, PlanRequest(64, steps=10**6))
    often = make_mixed_plan(MODEL, mixed, PlanRequest(64, steps=10**6, failures_per_1000_node_days=1e5))
    assert usual.outlook is not None and often.outlook is not None
    assert often.outlook.mtbf_hours < usual.outlook.mtbf_hours / 100
    assert usual.outlook.dollars is not None and "no price known" not in cost_line(usual)
    assert f"${usual.outlook.dollars:,.2f} (90 %" in cost_line(usual)
