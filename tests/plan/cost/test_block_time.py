"""What a block waits for: sums of tensor parallelism, gathers, exchanges, and how much of it computing hides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster import cpu_cluster, named_cluster
from meshwright.families.decoder import DecoderShape, card
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.constants import DATASHEET
from meshwright.plan.cost.block_memory import BlockMemory
from meshwright.plan.cost.block_time import BlockTimes, block_key, tensor_sums
from meshwright.plan.rules import FRAMEWORKS, Framework
from meshwright.plan.rules.frameworks import weights_stay_gathered

CLUSTER = named_cluster("h100-sxm-80gb", 64)
SHAPE = DecoderShape(2, 4096, 32, 8, 128, 14336, 32000)
MODEL = card(SHAPE, 4096, "megatron")
EMBED, LAYER, _, HEAD = MODEL.blocks
INPUTS = LAYER.output_elements
ALONE = replace(FRAMEWORKS["megatron-lm"], tensor_overlap=0.0, context_overlap=0.0, gather_overlap=0.0)


def blocks(framework: Framework = ALONE) -> BlockTimes:
    return BlockTimes(
        Workload(MODEL, CLUSTER, 1, "bf16", framework), DATASHEET, BlockMemory(framework, "bf16", CLUSTER.device)
    )


def test_a_layer_adds_up_twice_each_way_and_the_ends_once() -> None:
    assert tensor_sums(LAYER) == (2, 2)
    assert tensor_sums(EMBED) == (1, 0)
    assert tensor_sums(HEAD) == (0, 1)
    mixture = card(replace(SHAPE, experts=8, top_k=2, expert_ffn=1024, shared_ffn=1024), 4096, "megatron").blocks[1]
    assert tensor_sums(mixture) == (2, 2)


def test_waits_of_tensor_parallelism_are_its_all_reduces() -> None:
    model, layout = blocks(), Layout(tp=8)
    once = model.network.all_reduce(INPUTS * 2, model.network.group(8, 1))
    cost = model.cost(layout, LAYER, INPUTS)
    assert cost.forward_wait == pytest.approx(2 * once)
    assert cost.backward_wait == pytest.approx(2 * once)
    again = model.cost(replace(layout, recompute="full"), LAYER, INPUTS)
    assert again.backward_wait == pytest.approx(4 * once)


def test_what_hides_slows_computing_down_and_the_rest_is_waited_for() -> None:
    model = blocks()
    slows = DATASHEET["cuda.overlap.slows"]
    assert model._exposed(1.0, [(0.4, 0.5)]) == pytest.approx(0.2 + 0.2 * slows)
    assert model._exposed(0.1, [(0.4, 1.0)]) == pytest.approx(0.3 + 0.1 * slows)  # no more than there is to hide behind
    assert model._exposed(0.5, [(0.4, 1.0), (0.4, 1.0)]) == pytest.approx(0.3 + 0.5 * slows)  # and all share that
    assert model._exposed(1.0, [(0.0, 1.0)]) == 0.0


def test_sharded_weights_are_gathered_for_each_pass_but_not_in_a_pipeline() -> None:
    sharded, piped = Layout(dp=64, shard=64), Layout(dp=32, shard=32, pp=2)
    assert not weights_stay_gathered(sharded) and weights_stay_gathered(piped)
    cost = blocks().cost(sharded, LAYER, INPUTS)
    network = blocks().network
    gather = network.all_gather(LAYER.parameter_elements * 2, network.group(64, 1))
    assert cost.forward_wait == pytest.approx(gather)
    assert blocks().cost(piped, LAYER, INPUTS).forward_wait == 0
    assert block_key(piped) == block_key(replace(piped, dp=16, shard=1, pp=4))


def test_sharded_experts_are_gathered_over_the_ranks_that_hold_the_same_ones() -> None:
    mixture = replace(SHAPE, experts=8, top_k=2, expert_ffn=14336)
    layer = card(mixture, 4096, "megatron").blocks[1]
    model = blocks()
    experts = sum(p.elements for p in layer.parameters if "expert" in p.axes)
    dense = layer.parameter_elements - experts
    every, eight = model.network.group(64, 1), model.network.group(8, 8)
    gather = model.network.all_gather(dense * 2, every) + model.network.all_gather(experts // 8 * 2, eight)
    assert model._shard_seconds(Layout(dp=64, shard=64, ep=8), layer).gather == pytest.approx(gather)
    alone = model._shard_seconds(
        Layout(dp=8, shard=8, ep=8), layer
    ).gather  # each expert is on one rank: nothing to gather
    assert alone == pytest.approx(model.network.all_gather(dense * 2, model.network.group(8, 1)))


def test_where_every_micro_batch_reduces_so_do_the_groups_of_shards() -> None:
    each = replace(ALONE, reduces_each=True)
    hybrid, once = Layout(dp=64, shard=8), blocks(each)
    shard = once._shard_seconds(hybrid, LAYER)
    assert shard.sum > 0
    more = once.cost(hybrid, LAYER, INPUTS).backward_wait - blocks().cost(hybrid, LAYER, INPUTS).backward_wait
    assert more == pytest.approx(shard.scatter + shard.sum)


def test_what_is_sent_to_the_host_is_what_is_kept_but_for_a_loss() -> None:
    away = replace(ALONE, activation_offload=True)
    for block, inputs in ((LAYER, INPUTS), (HEAD, INPUTS)):
        memory = blocks(away).memory.block_bytes(block, inputs, Layout(recompute="full"))
        seconds = blocks(away)._offload_seconds(Layout(recompute="full"), block, inputs)
        assert seconds == pytest.approx((memory.saved - memory.loss) / blocks().offload_speed)
        assert memory.loss == 0 or memory.loss > 10 * (memory.saved - memory.loss)


def test_context_parallelism_hands_on_keys_and_values_of_the_groups_heads_only() -> None:
    def wait(kv_heads: int) -> float:
        layer = card(replace(SHAPE, kv_heads=kv_heads), 4096, "megatron").blocks[1]
        return blocks().cost(Layout(cp=8), layer, INPUTS).forward_wait

    assert 0 < wait(4) < wait(32)


def test_a_cpu_hides_nothing() -> None:
    small = card(DecoderShape(1, 64, 4, 4, 16, 256, 512), 64)
    ours, cores = FRAMEWORKS["meshwright"], cpu_cluster(2)
    model = BlockTimes(Workload(small, cores, 1, "fp32", ours), DATASHEET, BlockMemory(ours, "fp32", cores.device))
    assert model.overlap == 0.0
    tiny = small.blocks[1]
    assert model.cost(Layout(tp=2), tiny, tiny.output_elements).forward_wait > 0
