"""Laws of every estimate, whatever the constants; and the fast length of a schedule against its replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster import cpu_cluster, named_cluster
from meshwright.families.decoder import DecoderShape, card
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.cost import Estimate, Estimator
from meshwright.plan.cost.estimate import equal_layers
from meshwright.plan.pipeline.actions import schedule_problem
from meshwright.plan.rules import FRAMEWORKS, Framework

SHAPE = DecoderShape(16, 2048, 16, 16, 128, 8192, 32000)
MODEL = card(SHAPE, 2048, "megatron")
EXPERTS = card(replace(SHAPE, experts=8, top_k=2, expert_ffn=2048), 2048, "megatron")
CLUSTER = named_cluster("h100-sxm-80gb", 64)
BATCH = 256
MEGATRON, NEMO = FRAMEWORKS["megatron-lm"], FRAMEWORKS["nemo"]
powers = st.sampled_from([1, 2, 4, 8])


def estimate(layout: Layout, framework: Framework = MEGATRON, profile: Profile = DATASHEET) -> Estimate:
    return Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16", framework), profile).estimate(layout)


SHARED = {name: Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16", row)) for name, row in FRAMEWORKS.items()}


@settings(max_examples=40)
@given(
    powers, powers, powers, powers, st.booleans(), st.sampled_from(["none", "selective", "full"]),
    st.sampled_from(["1f1b", "gpipe", "interleaved", "zb-h1", "zbv", "dualpipev"]), st.sampled_from(list(FRAMEWORKS)),
)  # fmt: skip
def test_the_parts_of_a_step_are_its_length(
    tp: int, pp: int, shard: int, micro: int, sequence: bool, recompute: str, schedule: str, framework: str
) -> None:
    dp, folded = 64 // (tp * pp) or 1, schedule in ("interleaved", "zbv", "dualpipev")
    layout = Layout(
        dp=dp, shard=min(shard, dp), tp=tp, pp=pp, vpp=2 if folded and pp > 1 else 1, micro_batch=min(micro, 4),
        sequence_parallel=sequence and tp > 1, recompute=recompute, schedule=schedule if pp > 1 else "1f1b",
    )  # fmt: skip
    if schedule_problem(layout.schedule, pp, layout.micro_batches(BATCH), layout.vpp):
        return
    found = SHARED[framework].estimate(layout)
    assert sum(found.breakdown.values()) == pytest.approx(found.step_seconds)
    assert all(seconds >= -1e-9 for seconds in found.breakdown.values())
    assert len(found.memory) == pp and len(found.forward_seconds) == pp * layout.vpp == len(found.first_blocks)
    assert all(stage.allocated <= stage.reserved <= stage.total for stage in found.memory)


@settings(max_examples=25)
@given(powers.filter(lambda pp: pp > 1), st.sampled_from(["1f1b", "gpipe", "interleaved", "zb-h1"]), powers)
def test_the_formula_agrees_with_the_replay(pp: int, schedule: str, micro: int) -> None:
    layout = Layout(dp=64 // pp, pp=pp, vpp=2 if schedule == "interleaved" else 1, schedule=schedule, micro_batch=micro)
    if layout.micro_batches(BATCH) % pp or not layout.micro_batches(BATCH):
        return
    quick, slow = (SHARED["nemo"].estimate(layout, exact=exact).step_seconds for exact in (False, True))
    assert quick == pytest.approx(slow, rel=0.02)


def test_equal_blocks_are_computed_once() -> None:
    estimator = Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16"))
    estimator.estimate(Layout(dp=64))
    assert len(next(iter(estimator._costs.values()))) == 3  # embedding, layer, head


def test_schedules_with_less_idling_are_quicker() -> None:
    base = Layout(dp=8, pp=8, micro_batch=4)
    plain = estimate(base).step_seconds
    assert estimate(replace(base, schedule="interleaved", vpp=2)).step_seconds < plain
    assert estimate(replace(base, schedule="zb-h1")).step_seconds < plain
    assert estimate(replace(base, micro_batch=1)).bubble_seconds < estimate(base).bubble_seconds


def test_what_is_overlapped_is_not_waited_for() -> None:
    layout = Layout(dp=8, tp=8, micro_batch=2)
    alone = replace(NEMO, gradient_overlap=0.0, gather_overlap=0.0, tensor_overlap=0.0)
    assert estimate(layout, NEMO).communication_seconds < estimate(layout, alone).communication_seconds
    assert estimate(layout, NEMO).step_seconds < estimate(layout, alone).step_seconds


def test_sharding_costs_gathers_and_fewer_when_gradients_are_reduced_once() -> None:
    whole, sharded = Layout(dp=64, micro_batch=1), Layout(dp=64, shard=64, micro_batch=1)
    once = replace(FRAMEWORKS["torchtitan"], gather_overlap=0.0, reduces_each=False)
    each = replace(once, reduces_each=True)
    assert estimate(whole, once).step_seconds < estimate(sharded, once).step_seconds
    assert estimate(sharded, once).step_seconds < estimate(sharded, each).step_seconds


def test_a_distributed_optimizer_updates_a_part_and_gathers_it() -> None:
    layout = Layout(dp=64)
    spread = replace(MEGATRON, optimizer_shard="dp")
    assert estimate(layout, spread).optimizer_seconds < estimate(layout).optimizer_seconds / 32
    assert estimate(layout, spread).per_step.weights > 0 == estimate(layout).per_step.weights


def test_small_models_wait_for_the_host() -> None:
    tiny = card(DecoderShape(16, 256, 4, 4, 64, 1024, 1024), 128, "megatron")
    one = named_cluster("h100-sxm-80gb", 1)
    slow = Estimator(Workload(tiny, one, 8, "bf16", MEGATRON), DATASHEET).estimate(Layout())
    free = replace(one, device=replace(one.device, launch_seconds=0.0))
    quick = Estimator(Workload(tiny, free, 8, "bf16", MEGATRON), DATASHEET).estimate(Layout())
    assert slow.launch_seconds > slow.compute_seconds
    assert quick.step_seconds < slow.step_seconds / 2
    large = estimate(Layout(dp=64, micro_batch=4))
    assert large.launch_seconds < 0.05 * large.compute_seconds  # the larger of the two, not their sum


def test_recompute_costs_time_and_saves_memory() -> None:
    none, full = (estimate(Layout(dp=64, micro_batch=4, recompute=word)) for word in ("none", "full"))
    assert none.step_seconds < full.step_seconds < 1.5 * none.step_seconds
    assert full.peak_bytes < none.peak_bytes


def test_offload_costs_time() -> None:
    layout = Layout(dp=64, shard=64)
    assert estimate(replace(layout, offload=True)).optimizer_seconds > estimate(layout).optimizer_seconds


def test_activations_sent_to_the_host_are_waited_for_where_computing_does_not_hide_them() -> None:
    layout, away = Layout(dp=64, micro_batch=4), replace(MEGATRON, activation_offload=True)
    slow = DATASHEET.changed({"cuda.offload.bytes_per_second": 1e9})
    assert estimate(layout).step_seconds < estimate(layout, away).step_seconds
    assert estimate(layout, away).step_seconds < estimate(layout, away, profile=slow).step_seconds


def test_long_sequences_are_split_by_context_parallelism() -> None:
    long = card(SHAPE, 65536, "megatron")
    estimator = Estimator(Workload(long, CLUSTER, 64, "bf16", NEMO), DATASHEET)
    whole, split = estimator.estimate(Layout(dp=8, tp=8)), estimator.estimate(Layout(dp=4, tp=8, cp=2))
    assert split.communication_seconds > 0
    assert split.forward_seconds[0] == pytest.approx(whole.forward_seconds[0] / 2, rel=0.2)


def test_experts_exchange_tokens_and_dearer_across_nodes() -> None:
    def waits(**fields: int) -> float:
        estimator = Estimator(Workload(EXPERTS, CLUSTER, BATCH, "bf16", MEGATRON), DATASHEET)
        found = estimator.estimate(Layout(dp=64, micro_batch=2, **fields))
        return found.communication_seconds - found.per_step.waits

    assert waits() == 0 < waits(ep=2) < waits(ep=8)
    wide = replace(EXPERTS, blocks=card(replace(SHAPE, experts=16, top_k=2, expert_ffn=2048), 2048).blocks)
    found = Estimator(Workload(wide, CLUSTER, BATCH, "bf16", MEGATRON), DATASHEET)
    across = found.estimate(Layout(dp=64, micro_batch=2, ep=16))
    assert across.communication_seconds - across.per_step.waits > 2 * waits(ep=8)


def test_a_rank_waits_for_its_share_of_the_batch_where_nothing_reads_ahead() -> None:
    ahead = replace(FRAMEWORKS["meshwright"], reads_ahead=True)
    for dp in (8, 64):
        waits, hidden = (
            Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16", row), DATASHEET).estimate(Layout(dp=dp, tp=64 // dp))
            for row in (FRAMEWORKS["meshwright"], ahead)
        )
        reading = BATCH // dp * MODEL.units_per_sample * DATASHEET["cuda.data.unit_seconds"]
        assert waits.step_seconds == pytest.approx(hidden.step_seconds + reading, rel=1e-9)
        assert waits.breakdown["other"] == pytest.approx(hidden.breakdown["other"] + reading)


def test_stages_are_cut_by_layers_and_by_cost_where_the_framework_does_so() -> None:
    assert equal_layers(16, 4) == (0, 5, 9, 13)
    assert equal_layers(126, 32) == tuple(range(0, 128, 4))  # embedding and head count as layers
    assert equal_layers(7, 4) is None
    theirs = Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16", MEGATRON)).stages(Layout(dp=8, pp=8))
    ours = Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16", FRAMEWORKS["meshwright"])).stages(Layout(dp=8, pp=8))
    assert theirs == equal_layers(16, 8)
    assert len(MODEL.blocks) - ours[-1] < len(MODEL.blocks) - theirs[-1] + 1  # the head weighs on the last stage


def test_more_devices_are_quicker_in_all() -> None:
    few = Estimator(Workload(MODEL, named_cluster("h100-sxm-80gb", 8), BATCH, "bf16"), DATASHEET).estimate(Layout(dp=8))
    many = Estimator(Workload(MODEL, CLUSTER, BATCH, "bf16"), DATASHEET).estimate(Layout(dp=64))
    assert few.step_seconds / 8 < many.step_seconds < few.step_seconds


def test_precisions_of_the_device_are_ranked_as_its_rates() -> None:
    device = named_cluster("b200-sxm", 8)
    steps = [
        Estimator(Workload(MODEL, device, BATCH, word, NEMO), DATASHEET)
        .estimate(Layout(dp=8, micro_batch=4))
        .step_seconds
        for word in ("fp4", "fp8", "bf16", "fp32")
    ]
    assert steps == sorted(steps)


def test_a_cpu_pays_for_host_and_device() -> None:
    tiny = card(DecoderShape(2, 64, 4, 4, 16, 256, 512), 64)
    found = Estimator(Workload(tiny, cpu_cluster(2), 8, "fp32")).estimate(Layout(dp=2))
    assert found.step_seconds > 0 and sum(found.breakdown.values()) == pytest.approx(found.step_seconds)
