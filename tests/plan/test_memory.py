"""Memory against figures worked out by hand and from other people's formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.card import Block, Card, Parameter, Saved
from meshwright.cluster import Cluster, named_cluster
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import Layout
from meshwright.plan.estimate import Estimator
from meshwright.plan.memory import PROCESS_BYTES, StageMemory

H100 = named_cluster("h100-sxm-80gb", 8)
LLAMA_8B = LlamaShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)


def stages(
    model: Card, layout: Layout, global_batch: int, precision: str, cluster: Cluster = H100
) -> list[StageMemory]:
    return list(Estimator(model, cluster, global_batch, precision).estimate(layout).memory)


def toy(blocks: int = 4, parameters: int = 1000, saved: int = 500) -> Card:
    """Blocks of one vector parameter, each keeping `saved` elements a sample and handing on 10."""
    return Card(
        "toy",
        tuple(
            Block(
                str(i),
                "block",
                (Parameter(f"blocks.{i}.w", (parameters,), (None,)),),
                saved=(Saved("x", saved),),
                output_elements=10,
            )
            for i in range(blocks)
        ),
        splittable=frozenset({"pp"}),
    )


def test_llama_8b_has_the_parameters_that_its_authors_state() -> None:
    # Llama 3 (arXiv 2407.21783): 8.03 B. By hand: embeddings twice, 32 layers, the last norm.
    by_hand = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096
    assert card(LLAMA_8B, 8192).parameter_elements == by_hand == 8_030_261_248


def test_states_of_one_device_take_eighteen_bytes_a_parameter_in_bf16() -> None:
    memory = stages(card(LLAMA_8B, 8192), Layout(), 1, "bf16", named_cluster("h100-sxm-80gb", 1))[0]
    n = 8_030_261_248
    assert memory.weights == (4 + 2) * n  # masters and the copy to compute with
    assert memory.gradients == 4 * n
    assert memory.optimizer == 8 * n


def test_sharding_divides_masters_moments_and_gradients() -> None:
    model = toy()
    one = stages(model, Layout(dp=8, shard=1), 8, "bf16")[0]
    eight = stages(model, Layout(dp=8, shard=8), 8, "bf16")[0]
    assert one.optimizer == 8 * 4000 and eight.optimizer == 8 * 500
    assert one.gradients == 4 * 4000 and eight.gradients == 4 * 500
    assert one.weights == 6 * 4000
    assert eight.weights == 4 * 500 + 2 * 2000  # two blocks are gathered at a time


def test_gradients_are_whole_while_micro_batches_accumulate() -> None:
    assert stages(toy(), Layout(dp=8, shard=8), 16, "fp32")[0].gradients == 4 * 4000


def test_1f1b_keeps_fewer_activations_the_later_the_stage_and_gpipe_keeps_all() -> None:
    layout, sample = Layout(pp=4, micro_batch=2), 2 * 500 * 4
    assert [m.activations for m in stages(toy(), layout, 16, "fp32")] == [4 * sample, 3 * sample, 2 * sample, sample]
    assert [m.activations for m in stages(toy(), replace(layout, schedule="gpipe"), 16, "fp32")] == [8 * sample] * 4
    # No more are in flight than there are.
    assert [m.activations for m in stages(toy(), layout, 4, "fp32")] == [2 * sample] * 3 + [sample]


def test_full_recompute_keeps_only_what_each_block_was_given() -> None:
    memory = stages(toy(blocks=1), Layout(micro_batch=4, recompute="full"), 4, "fp32")[0]
    assert memory.activations == 4 * 10 * 4


def test_llama_layer_activations_match_a_count_by_hand() -> None:
    # bf16, one sample of 8192 tokens, no recompute. Inputs of both norms and of both groups of products, q, k, v,
    # attention's output, gate, up, silu and their product; and a fp32 log-sum-exp a head.
    t, h, f, kv, heads = 8192, 4096, 14336, 1024, 32
    layer = 2 * t * (4 * h + h + 2 * kv + h + 4 * f) + 4 * t * heads
    head = 2 * t * (2 * h + 2 * 128256)
    memory = stages(card(LLAMA_8B, t), Layout(), 1, "bf16", named_cluster("h100-sxm-80gb", 1))[0]
    assert memory.activations == pytest.approx(32 * layer + head, rel=0.01)


def test_sequence_parallel_divides_what_tensor_parallel_does_not() -> None:
    model = card(LLAMA_8B, 8192)
    plain = stages(model, Layout(tp=8), 1, "bf16")[0].activations
    split = stages(model, Layout(tp=8, sequence_parallel=True), 1, "bf16")[0].activations
    assert split < plain


def test_the_last_stage_holds_a_copy_of_tied_embeddings() -> None:
    shape = LlamaShape(layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=512, tied=True)
    last = stages(card(shape, 32), Layout(pp=4), 4, "fp32")[-1]
    assert last.optimizer == 8 * (64 + 512 * 64)  # the norm and the alias


def test_the_total_is_the_sum_of_its_parts() -> None:
    memory = StageMemory(1, 2, 3, 4, 5)
    assert memory.total == sum(memory.as_dict().values()) == 15
    assert stages(toy(), Layout(), 1, "fp32", named_cluster("l4", 1))[0].other >= PROCESS_BYTES["cuda"]
