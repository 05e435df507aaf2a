"""Work per step: gradients, weights, the optimizer, and what hides behind the last backward."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.card import Card
from meshwright.cluster import named_cluster
from meshwright.families.decoder import DecoderShape, card
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.constants import DATASHEET
from meshwright.plan.cost.block_memory import BlockMemory
from meshwright.plan.cost.block_time import BlockTimes
from meshwright.plan.cost.per_step import PerStepTimes
from meshwright.plan.rules import FRAMEWORKS, Framework

MODEL = card(DecoderShape(2, 1024, 16, 16, 64, 4096, 32000), 1024, "megatron")
PLAIN = FRAMEWORKS["megatron-lm"]


def per_step(framework: Framework = PLAIN, model: Card = MODEL) -> PerStepTimes:
    cluster = named_cluster("h100-sxm-80gb", 64)
    memory = BlockMemory(framework, "bf16", cluster.device)
    return PerStepTimes(BlockTimes(Workload(model, cluster, 1, "bf16", framework), DATASHEET, memory))


def test_replicated_gradients_are_all_reduced_in_the_precision_of_the_wire() -> None:
    layout, found = Layout(dp=64), per_step()
    reduce = found.network.all_reduce(1e9 * 4, found.network.group(64, 1))
    assert found.seconds(layout, [1e9], 0.0, 1).gradients == pytest.approx(reduce, rel=0.01)
    narrow = per_step(replace(PLAIN, gradient_wire_bytes=2)).seconds(layout, [1e9], 0.0, 1).gradients
    assert narrow == pytest.approx(reduce / 2, rel=0.02)


def test_only_a_backward_can_hide_the_reduction_and_only_where_the_framework_overlaps() -> None:
    layout, overlaps = Layout(dp=64), replace(PLAIN, gradient_overlap=1.0)
    assert per_step().seconds(layout, [1e9], 1.0, 1) == per_step().seconds(layout, [1e9], 0.0, 1)
    some, all_of_it = (per_step(overlaps).seconds(layout, [1e9], last, 1).gradients for last in (0.01, 10.0))
    assert all_of_it < some < per_step().seconds(layout, [1e9], 0.0, 1).gradients
    assert all_of_it < 1e-3


def test_interleaved_chunks_end_one_after_another_and_hide_more() -> None:
    overlaps = replace(PLAIN, gradient_overlap=1.0)
    plain, woven = Layout(dp=16, pp=4), Layout(dp=16, pp=4, vpp=2, schedule="interleaved")
    elements = [1e9] * 4
    assert (
        per_step(overlaps).seconds(woven, elements, 0.02, 8).gradients
        < per_step(overlaps).seconds(plain, elements, 0.02, 8).gradients
    )


def test_without_overlap_the_largest_stage_is_waited_for() -> None:
    layout = Layout(dp=16, pp=4)
    found = per_step().seconds(layout, [1e8, 1e8, 1e8, 9e8], 0.0, 8).gradients
    assert found == pytest.approx(per_step().seconds(layout, [9e8] * 4, 0.0, 8).gradients)


def test_tied_embeddings_are_summed_over_the_ends_of_a_pipeline() -> None:
    tied = card(DecoderShape(2, 1024, 16, 16, 64, 4096, 32000, tied=True), 1024, "megatron")
    layout = Layout(dp=32, pp=2)
    apart, together = (per_step(model=model).seconds(layout, [1e8] * 2, 0.0, 4).gradients for model in (MODEL, tied))
    assert together > apart
    folded = replace(layout, vpp=2, schedule="zbv")  # both ends are on the first rank
    apart, together = (per_step(model=model).seconds(folded, [1e8] * 2, 0.0, 4).gradients for model in (MODEL, tied))
    assert together == apart


def test_experts_are_summed_over_the_ranks_that_hold_the_same_ones() -> None:
    whole, alone = Layout(dp=64), Layout(dp=64, ep=64)
    all_dense = per_step().seconds(whole, [1e9], 0.0, 1).gradients
    each_once = per_step().seconds(alone, [1e9], 0.0, 1, [1e9]).gradients
    assert each_once < 1e-3 * all_dense + 1e-3
    eight = per_step().seconds(replace(whole, ep=8), [1e9], 0.0, 1, [1e9]).gradients
    across = per_step().network.all_reduce(1e9 * 4, per_step().network.group(8, 8))  # one rank of each node
    assert eight == pytest.approx(across, rel=0.01)


def test_a_distributed_optimizer_scatters_and_gathers_and_updates_its_part() -> None:
    layout, spread = Layout(dp=64), per_step(replace(PLAIN, optimizer_shard="dp"))
    assert spread.seconds(layout, [1e9], 0.0, 1).weights > 0 == per_step().seconds(layout, [1e9], 0.0, 1).weights
    assert spread.update(layout, 1e9) == pytest.approx(per_step().update(layout, 1e9) / 64)


def test_every_expert_is_updated_once_however_they_are_spread() -> None:
    spread = per_step(replace(PLAIN, optimizer_shard="dp"))
    for optimizer in (spread, per_step()):
        whole = optimizer.update(Layout(dp=8, shard=8), 8e9, 8e9)
        assert optimizer.update(Layout(dp=8, shard=8, ep=8), 1e9, 1e9) == pytest.approx(whole)
