"""The search: its layouts are allowed and fit, whatever the request; and its errors where none does."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.card import Block, Card, Parameter
from meshwright.cluster import Cluster, Device, Link, named_cluster
from meshwright.errors import CannotWork, InputError
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import LayoutQuery, ModelFacts, Plan, PlanRequest, Workload, balance, make_plan, refusals
from meshwright.plan.constants import default_profile
from meshwright.plan.constants.correction import Correction
from meshwright.plan.constants.regime import correction_regime, features
from meshwright.plan.cost import usable_bytes
from meshwright.plan.search.walk import TIE

SMALL = card(LlamaShape(layers=4, hidden=48, heads=12, kv_heads=4, head_dim=4, ffn=96, vocab=240), 64)
LLAMA_8B = card(LlamaShape(32, 4096, 32, 8, 128, 14336, 128256), 8192)
LLAMA_70B = card(LlamaShape(80, 8192, 64, 8, 128, 28672, 128256), 8192)
MODULE = Card("module", (Block("", "module", (Parameter("w", (64, 64), (None, None)),), output_elements=64),))


def cores(devices: int, memory_bytes: int = 8 * 2**30) -> Cluster:
    device = Device("core", "cpu", memory_bytes, {"fp32": 80e9, "bf16": 300e9}, 30e9, 6e-6)
    link = Link("gloo", 1e9, 0.3e-3)
    return Cluster(device, devices, devices, link, link)


def refusal_of(model: Card, cluster: Cluster, request: PlanRequest) -> str:
    with pytest.raises(CannotWork) as caught:
        make_plan(model, cluster, request)
    return str(caught.value)


@settings(max_examples=60)
@given(
    devices=st.integers(1, 12),
    batch=st.integers(1, 32),
    pins=st.fixed_dictionaries(
        {},
        optional={
            "dp": st.integers(1, 6),
            "shard": st.integers(1, 4),
            "tp": st.integers(1, 6),
            "pp": st.integers(1, 8),
            "micro_batch": st.integers(1, 8),
            "sequence_parallel": st.booleans(),
            "recompute": st.sampled_from(["none", "selective", "full"]),
            "schedule": st.sampled_from(["gpipe", "1f1b"]),
        },
    ),
)
def test_any_plan_is_allowed_fits_and_keeps_its_pins(devices: int, batch: int, pins: dict[str, Any]) -> None:
    cluster, facts = cores(devices), ModelFacts.of(SMALL)
    try:
        plan = make_plan(SMALL, cluster, PlanRequest(batch, "fp32", pins))
    except CannotWork as error:
        assert all(problem.nearest for problem in error.problems)
        return
    for choice in (plan.chosen, *plan.runners_up):
        layout = choice.layout
        assert refusals(LayoutQuery(layout, facts, devices, batch)) == ()
        assert all(getattr(layout, name) == value for name, value in pins.items())
        assert choice.predicted.peak_bytes <= usable_bytes(cluster.device)
        assert choice.predicted.peak_bytes == max(stage.total for stage in choice.memory)
        assert [name for stage in choice.stages for name in stage] == [block.name for block in SMALL.blocks]
        assert len(choice.stages) == layout.pp and all(choice.stages)
        seconds = choice.predicted.step_seconds
        assert seconds.low < seconds.mid < seconds.high
        assert sum(choice.predicted.breakdown.values()) == pytest.approx(seconds.mid)
        assert 0 < choice.predicted.mfu < 1


@settings(max_examples=40)
@given(
    devices=st.integers(1, 8),
    pins=st.fixed_dictionaries(
        {}, optional={"dp": st.integers(1, 5), "tp": st.integers(1, 5), "pp": st.integers(1, 7), "cp": st.just(1)}
    ),
)
def test_the_nearest_of_refused_pins_works(devices: int, pins: dict[str, int]) -> None:
    try:
        make_plan(SMALL, cores(devices), PlanRequest(24, "fp32", pins))
    except CannotWork as error:
        for problem in error.problems:
            changes = dict(word.split("=") for word in problem.nearest.removeprefix("nearest: ").split())
            batch = int(changes.pop("train.global_batch", 24))
            nearest = {key.removeprefix("layout."): int(value) for key, value in changes.items()}
            make_plan(SMALL, cores(devices), PlanRequest(batch, "fp32", nearest))


def test_equal_questions_get_equal_plans_and_json_carries_them_whole() -> None:
    cluster, request = named_cluster("h100-sxm-80gb", 16), PlanRequest(64)
    first, second = (make_plan(LLAMA_8B, cluster, request) for _ in range(2))
    assert str(first) == str(second)
    assert Plan.from_dict(json.loads(str(first))) == first


def test_the_json_is_the_contract() -> None:
    plan = make_plan(SMALL, cores(2), PlanRequest(16)).as_dict()
    predicted = plan["chosen"]["predicted"]
    assert set(predicted["step_seconds"]) == {"low", "mid", "high"}
    assert {"peak_bytes", "tokens_per_second", "mfu", "dollars", "goodput"} <= set(predicted)
    assert {"layout", "predicted", "binding", "why", "stages"} <= set(plan["chosen"])
    assert all({"layout", "why"} <= set(choice) for choice in plan["runners_up"])
    assert predicted["dollars"] is None and 0.9 < predicted["goodput"] < 1
    assert {"objective", "framework", "limit", "considered", "buys", "outlook", "shares"} <= set(plan)
    step = predicted["step_seconds"]["mid"]
    assert predicted["tokens_per_second"] == pytest.approx(16 * 64 / step)


def test_a_plan_of_an_earlier_version_is_read() -> None:
    plan = make_plan(SMALL, cores(2), PlanRequest(16))
    old = plan.as_dict()
    for name in ("objective", "framework", "limit", "considered", "buys", "outlook", "shares"):
        del old[name]
    for choice in (old["chosen"], *old["runners_up"]):
        del choice["level"], choice["pipeline"]["weight_seconds"]
    for lost in old["rejected"]:
        del lost["count"]
    read = Plan.from_dict(old)
    assert read.chosen.layout == plan.chosen.layout and read.buys == () and read.outlook is None


def test_a_broken_plan_file_is_bad_input() -> None:
    with pytest.raises(InputError, match="not a plan"):
        Plan.from_dict({"chosen": {}})


def test_runners_up_are_no_better_and_say_why_they_lost() -> None:
    plan = make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 8), PlanRequest(64))
    assert plan.runners_up
    for choice in plan.runners_up:
        assert choice.predicted.step_seconds.mid >= (1 - TIE) * plan.chosen.predicted.step_seconds.mid
        assert "slower" in choice.why or "level" in choice.why


def test_small_models_on_a_few_cores_are_replicated() -> None:
    layout = make_plan(SMALL, cores(2), PlanRequest(16)).chosen.layout
    assert (layout.dp, layout.tp, layout.pp, layout.recompute) == (2, 1, 1, "none")


def test_what_does_not_fit_is_rejected_with_its_gap() -> None:
    plan = make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 8), PlanRequest(64))
    reasons = [lost.reason for lost in plan.rejected]
    assert any("does not fit: needs" in reason for reason in reasons)
    assert plan.chosen.layout not in [lost.layout for lost in plan.rejected]


def test_recompute_is_taken_only_where_it_is_needed() -> None:
    roomy = make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 64), PlanRequest(64))
    assert roomy.chosen.layout.recompute == "none"
    plan = make_plan(LLAMA_70B, named_cluster("h100-sxm-80gb", 32), PlanRequest(512))
    assert plan.chosen.layout.recompute != "none" and plan.chosen.binding == "memory"


def test_a_model_too_large_says_by_how_much_and_what_would_do() -> None:
    message = refusal_of(LLAMA_70B, named_cluster("h100-sxm-80gb", 8), PlanRequest(64))
    assert "does not fit" in message and "GiB too much" in message and "nearest that fits: " in message
    devices = int(message.split("nearest that fits: ")[1].split()[0])
    make_plan(LLAMA_70B, named_cluster("h100-sxm-80gb", devices), PlanRequest(64))


def test_pins_that_do_not_fit_get_the_nearest_that_does() -> None:
    request = PlanRequest(64, pins={"dp": 8, "recompute": "none"})
    message = refusal_of(LLAMA_8B, named_cluster("h100-sxm-80gb", 8), request)
    assert "nearest that fits: layout." in message


def test_pins_that_do_not_multiply_to_the_devices() -> None:
    message = refusal_of(SMALL, cores(2), PlanRequest(16, pins={"dp": 2, "tp": 2}))
    assert "is 4, not 2 devices" in message and message.endswith("nearest: layout.tp=1")


def test_several_bad_pins_are_all_listed_with_their_places() -> None:
    request = PlanRequest(16, pins={"ep": 2, "tp": 5}, origins={"layout.tp": "job.toml:7"})
    message = refusal_of(SMALL, cores(5), request)
    assert "layout.ep" in message and "job.toml:7: layout.tp: tp=5 does not divide" in message


def test_money_may_take_fewer_devices_and_is_never_dearer() -> None:
    cluster = named_cluster("h100-sxm-80gb", 64)
    request = PlanRequest(8, steps=1000)
    quick, cheap = (make_plan(LLAMA_8B, cluster, replace(request, objective=o)) for o in ("time", "money"))

    def price(plan: Plan) -> float:
        return plan.chosen.predicted.step_seconds.mid * plan.chosen.layout.devices

    assert quick.chosen.layout.devices == 64
    assert cheap.chosen.layout.devices < 64 and cheap.chosen.layout.devices % 8 == 0, "whole nodes"
    assert price(cheap) < price(quick)
    assert cheap.cluster.startswith(f"{cheap.chosen.layout.devices} x ")
    assert any("dearer" in choice.why for choice in cheap.runners_up)
    dollars = [plan.chosen.predicted.dollars for plan in (quick, cheap)]
    assert dollars[0] is not None and dollars[1] is not None and dollars[1] < dollars[0]


def test_money_counts_spare_nodes_and_lost_work() -> None:
    """Fewer nodes need a spare too, so device-seconds alone would choose the dearer plan."""
    cluster = named_cluster("h100-sxm-80gb", 64)
    request = PlanRequest(512, steps=500_000)
    plans = [make_plan(LLAMA_8B, cluster, replace(request, objective=o)) for o in ("time", "money")]
    quick, cheap = (plan.chosen.predicted.dollars for plan in plans)
    assert quick and cheap and cheap <= quick * (1 + 1e-9)


def test_money_of_one_node_may_take_a_part_of_it() -> None:
    plan = make_plan(SMALL, cores(4), PlanRequest(16, objective="money"))
    assert plan.objective == "money" and plan.chosen.layout.devices in (1, 2, 4)


def test_other_frameworks_run_other_layouts() -> None:
    cluster = named_cluster("h100-sxm-80gb", 8)
    ours = make_plan(LLAMA_8B, cluster, PlanRequest(64))
    theirs = make_plan(LLAMA_8B, cluster, PlanRequest(64, framework="megatron-lm", pins={"cp": 2, "vpp": 2}))
    assert (ours.framework, theirs.framework) == ("meshwright", "megatron-lm")
    assert (ours.chosen.layout.cp, ours.chosen.layout.vpp) == (1, 1)
    layout = theirs.chosen.layout
    assert (layout.cp, layout.vpp, layout.schedule) == (2, 2, "interleaved") and layout.pp > 1


def test_what_a_profile_has_learnt_counts() -> None:
    """With a correction that doubles the time of the best layout, the plan is twice as long or takes another."""
    cluster, request = cores(2), PlanRequest(16, "fp32")
    first = make_plan(SMALL, cluster, request).chosen
    run = Workload(SMALL, cluster, 16, "fp32"), first.layout
    twice = Correction(correction_regime(*run), 1.0, 0.01, (features(*run),), (log(2),), 1)
    second = make_plan(SMALL, cluster, request, replace(default_profile(), corrections={twice.regime: twice})).chosen
    if second.layout == first.layout:
        assert second.predicted.step_seconds.mid == pytest.approx(2 * first.predicted.step_seconds.mid, rel=0.02)
    else:
        assert second.predicted.step_seconds.mid > first.predicted.step_seconds.mid
    assert sum(second.predicted.breakdown.values()) == pytest.approx(second.predicted.step_seconds.mid)


def test_an_unknown_framework_or_objective_is_bad_input() -> None:
    with pytest.raises(InputError, match="did you mean 'megatron-lm'"):
        make_plan(SMALL, cores(1), PlanRequest(16, framework="megatron"))
    with pytest.raises(InputError, match="known: money, time"):
        make_plan(SMALL, cores(1), PlanRequest(16, objective="fame"))


def test_what_was_considered_is_counted_and_what_lost_is_grouped() -> None:
    model = card(LlamaShape(6, 8192, 64, 8, 128, 28672, 128256), 8192)
    plan = make_plan(model, named_cluster("h100-sxm-80gb", 64), PlanRequest(64, framework="megatron-lm"))
    counts = plan.considered
    parts = sum(counts.get(name, 0) for name in ("estimated", "pruned", "too_large", "costlier"))
    assert counts["space"] > 1000 and counts["estimated"] < counts["space"] == parts
    assert len(plan.rejected) <= 200 and all(lost.count >= 1 and lost.reason for lost in plan.rejected)
    assert any(lost.count > 1 for lost in plan.rejected), "one layout stands for many that fail in the same way"


def test_an_unknown_pin_is_bad_input() -> None:
    with pytest.raises(InputError, match="did you mean 'recompute'"):
        make_plan(SMALL, cores(1), PlanRequest(16, pins={"recompte": "full"}))


def test_a_batch_that_cannot_be_divided_names_one_that_can() -> None:
    message = refusal_of(MODULE, cores(4), PlanRequest(10))
    assert "train.global_batch=8" in message or "train.global_batch=12" in message


def test_running_statistics_on_several_devices_name_one_device() -> None:
    normed = replace(MODULE, stateful_buffers=("norm.running_mean",))
    message = refusal_of(normed, cores(4), PlanRequest(16))
    assert "norm.running_mean" in message and "nearest: cluster.devices=1" in message
    assert make_plan(normed, cores(1), PlanRequest(16)).chosen.layout.dp == 1


def test_an_unsplittable_module_is_replicated_or_sharded() -> None:
    layout = make_plan(MODULE, cores(4), PlanRequest(16)).chosen.layout
    assert (layout.dp, layout.tp, layout.pp) == (4, 1, 1)


def test_a_price_gives_dollars() -> None:
    base = cores(2)
    priced = Cluster(base.device, 2, 2, base.intra, base.inter, dollars_per_hour=3.0)
    predicted = make_plan(SMALL, priced, PlanRequest(16, steps=1000)).chosen.predicted
    arithmetic = 1000 * predicted.step_seconds.mid / 3600 * 2 * 3.0
    assert predicted.goodput is not None and predicted.dollars == pytest.approx(arithmetic / predicted.goodput)


def test_compile_follows_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_plan(SMALL, cores(1), PlanRequest(16, compile=True)).chosen.compiled
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert not make_plan(SMALL, cores(1), PlanRequest(16, steps=10**9)).chosen.compiled  # no C++ compiler for a CPU
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert make_plan(SMALL, cores(1), PlanRequest(16, steps=10**9)).chosen.compiled
    assert not make_plan(SMALL, cores(1), PlanRequest(16, steps=10)).chosen.compiled
    h100 = named_cluster("h100-sxm-80gb", 8)
    assert make_plan(LLAMA_8B, h100, PlanRequest(64, steps=10_000)).chosen.compiled
    assert not make_plan(LLAMA_8B, h100, PlanRequest(64, steps=10)).chosen.compiled


@pytest.mark.parametrize(("devices", "batch"), [(16_384, 2048), (100_000, 4000)])
def test_405b_on_a_large_cluster_is_planned(devices: int, batch: int) -> None:
    model = card(LlamaShape(126, 16384, 128, 8, 128, 53248, 128256), 8192)
    plan = make_plan(model, named_cluster("h100-sxm-80gb", devices), PlanRequest(batch))
    assert plan.chosen.layout.devices == devices and plan.considered["estimated"] < 5_000
    assert 0.05 < plan.chosen.predicted.mfu < 0.6


def test_balance_gives_the_stages_of_the_plan() -> None:
    cluster = cores(4)
    chosen = make_plan(SMALL, cluster, PlanRequest(16, "fp32", {"pp": 4})).chosen
    assert balance(Workload(SMALL, cluster, 16, "fp32"), chosen.layout) == chosen.stages


def test_a_plan_for_megatron_spreads_the_optimizer_and_keeps_weights_whole_in_a_pipeline() -> None:
    plan = make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 64), PlanRequest(64, framework="megatron-lm"))
    for one in (plan.chosen, *plan.runners_up):
        assert one.layout.shard == 1 or (one.layout.pp == 1 and one.layout.shard == one.layout.dp * one.layout.cp)
        assert not one.compiled  # its kernels are fused by hand
    layout = plan.chosen.layout
    if layout.shard == 1:  # 12 bytes of masters and moments for 2 of weights, shared by all data-parallel ranks
        for stage in plan.chosen.memory:
            assert stage.optimizer == pytest.approx(6 * stage.weights / (layout.dp * layout.cp), rel=0.02)


def test_a_split_backward_is_not_compiled() -> None:
    pins = {"dp": 1, "pp": 4, "schedule": "zb-h1"}
    request = PlanRequest(64, steps=10_000, framework="torchtitan", pins=pins)
    assert not make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 32), request).chosen.compiled
    whole = replace(request, pins=pins | {"schedule": "1f1b"})
    assert make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 32), whole).chosen.compiled


@pytest.mark.parametrize("framework", ["meshwright", "megatron-lm", "nemo"])
def test_the_picture_of_a_pipeline_is_as_long_as_the_plan_says(framework: str) -> None:
    request = PlanRequest(64, pins={"pp": 4, "dp": 4, "tp": 2}, framework=framework)
    chosen = make_plan(LLAMA_8B, named_cluster("h100-sxm-80gb", 32), request).chosen
    inside = ("compute", "launch", "communication", "bubble")
    seconds = sum(chosen.predicted.breakdown.get(name, 0.0) for name in inside)
    assert chosen.timeline().seconds == pytest.approx(seconds, rel=1e-6)
    assert type(chosen).from_dict(chosen.as_dict()).timeline() == chosen.timeline()
