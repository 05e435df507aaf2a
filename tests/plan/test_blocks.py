"""What a block waits for: sums of tensor parallelism, gathers, exchanges, and how much of it computing hides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster import cpu_cluster, named_cluster
from meshwright.families.decoder import DecoderShape, card
from meshwright.layout import Layout
from meshwright.plan.blocks import Blocks, block_key, kept_gathered, tensor_sums
from meshwright.plan.framework import FRAMEWORKS, Framework
from meshwright.plan.profile import DATASHEET

CLUSTER = named_cluster("h100-sxm-80gb", 64)
SHAPE = DecoderShape(2, 4096, 32, 8, 128, 14336, 32000)
EMBED, LAYER, _, HEAD = card(SHAPE, 4096, "megatron").blocks
GIVEN = LAYER.output_elements
ALONE = replace(FRAMEWORKS["megatron-lm"], tensor_overlap=0.0, context_overlap=0.0, gather_overlap=0.0)


def blocks(framework: Framework = ALONE) -> Blocks:
    return Blocks(CLUSTER, "bf16", DATASHEET, framework)


def test_a_layer_adds_up_twice_each_way_and_the_ends_once() -> None:
    assert tensor_sums(LAYER) == (2, 2)
    assert tensor_sums(EMBED) == (1, 0)
    assert tensor_sums(HEAD) == (0, 1)
    mixture = card(replace(SHAPE, experts=8, top_k=2, expert_ffn=1024, shared_ffn=1024), 4096, "megatron").blocks[1]
    assert tensor_sums(mixture) == (2, 2)


def test_waits_of_tensor_parallelism_are_its_all_reduces() -> None:
    model, layout = blocks(), Layout(tp=8)
    once = model.network.all_reduce(GIVEN * 2, model.network.group(8, 1))
    cost = model.cost(layout, LAYER, GIVEN)
    assert cost.forward_wait == pytest.approx(2 * once)
    assert cost.backward_wait == pytest.approx(2 * once)
    again = model.cost(replace(layout, recompute="full"), LAYER, GIVEN)
    assert again.backward_wait == pytest.approx(4 * once)


def test_what_hides_slows_computing_down_and_the_rest_is_waited_for() -> None:
    model = blocks()
    slows = DATASHEET["cuda.overlap.slows"]
    assert model._beside(1.0, 0.4, 0.5) == pytest.approx(0.2 + 0.2 * slows)
    assert model._beside(0.1, 0.4, 1.0) == pytest.approx(0.3 + 0.1 * slows)  # no more than there is to hide behind
    assert model._beside(1.0, 0.0, 1.0) == 0.0


def test_sharded_weights_are_gathered_for_each_pass_but_not_in_a_pipeline() -> None:
    sharded, piped = Layout(dp=64, shard=64), Layout(dp=32, shard=32, pp=2)
    assert not kept_gathered(sharded) and kept_gathered(piped)
    cost = blocks().cost(sharded, LAYER, GIVEN)
    assert cost.forward_wait == pytest.approx(blocks().gather_seconds(sharded, LAYER.parameter_elements, 64))
    assert blocks().cost(piped, LAYER, GIVEN).forward_wait == 0
    assert block_key(piped) == block_key(replace(piped, dp=16, shard=1, pp=4))


def test_context_parallelism_hands_on_keys_and_values_of_the_groups_heads_only() -> None:
    def wait(kv_heads: int) -> float:
        layer = card(replace(SHAPE, kv_heads=kv_heads), 4096, "megatron").blocks[1]
        return blocks().cost(Layout(cp=8), layer, GIVEN).forward_wait

    assert 0 < wait(4) < wait(32)


def test_a_cpu_hides_nothing() -> None:
    model = Blocks(cpu_cluster(2), "fp32", DATASHEET, FRAMEWORKS["meshwright"])
    assert model.overlap == 0.0
    tiny = card(DecoderShape(1, 64, 4, 4, 16, 256, 512), 64).blocks[1]
    assert model.cost(Layout(tp=2), tiny, tiny.output_elements).forward_wait > 0
