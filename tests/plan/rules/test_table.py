"""Refusals: each names a change that satisfies the rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshwright.card import Block, Card, Parameter
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import SCHEDULES, Layout
from meshwright.plan import FRAMEWORKS, LayoutQuery, ModelFacts
from meshwright.plan.rules import RULES, refusals

LLAMA = ModelFacts.of(card(LlamaShape(6, 48, 12, 4, 4, 96, 240), 64))
PLAIN = ModelFacts.of(Card("plain", (Block("all", "module", (Parameter("w", (8,), (None,)),)),)))
MIXTURE = replace(LLAMA, experts=8)
NORMED_TP = replace(LLAMA, stateful_buffers=("norm.running_mean",))
NORMED = replace(PLAIN, stateful_buffers=("norm.running_mean",), blocks=3, splittable=frozenset({"pp"}))


def chain(*tied: tuple[str, str]) -> ModelFacts:
    """Facts of a model of four blocks, whose parameters in `tied` (as "block.leaf") are one tensor."""
    blocks = tuple(Block(name, "module", (Parameter(f"blocks.{name}.w", (8,), (None,)),)) for name in "abcd")
    pairs = tuple((f"blocks.{first}", f"blocks.{alias}") for first, alias in tied)
    return ModelFacts.of(Card("chain", blocks, tied=pairs, splittable=frozenset({"pp"})))


MEGATRON = "megatron-lm"
NOT_YET = "not offered yet by meshwright; plan for another framework with --for megatron-lm"

degree = st.integers(-1, 9)
layouts = st.builds(
    Layout,
    dp=degree,
    shard=degree,
    tp=degree,
    pp=degree,
    vpp=st.integers(0, 4),
    cp=st.integers(0, 5),
    ep=st.integers(0, 5),
    sequence_parallel=st.booleans(),
    micro_batch=degree,
    schedule=st.sampled_from([*SCHEDULES, "zigzag"]),
    recompute=st.sampled_from(["none", "selective", "full", "some"]),
    offload=st.booleans(),
)
queries = st.builds(
    LayoutQuery,
    layouts,
    st.sampled_from([LLAMA, PLAIN, NORMED, MIXTURE, chain(("a.w", "c.w"))]),
    st.integers(1, 16),
    st.integers(1, 24),
    st.sampled_from([FRAMEWORKS[name] for name in ("meshwright", MEGATRON, "torchtitan", "llm-foundry", "deepspeed")]),
)


def rules_broken(
    layout: Layout,
    facts: ModelFacts = LLAMA,
    devices: int | None = None,
    batch: int = 24,
    framework: str = "meshwright",
) -> dict[str, str]:
    devices = layout.devices if devices is None else devices
    query = LayoutQuery(layout, facts, devices, batch, FRAMEWORKS[framework])
    return {refusal.rule: f"{refusal.reason}; {refusal.nearest}" for refusal in refusals(query)}


@given(queries)
@example(LayoutQuery(Layout(dp=-1, pp=2, micro_batch=-1), LLAMA, 2, 1))
def test_the_nearest_change_removes_the_refusal(query: LayoutQuery) -> None:
    for refusal in refusals(query):
        assert refusal.change, refusal
        fixed = query.changed(refusal.change)
        assert refusal.rule not in {other.rule for other in refusals(fixed)}, (refusal, fixed.layout)


def test_a_pipeline_holds_ties_within_a_block_and_between_its_ends() -> None:
    for tied in ((), (("b.w", "b.v"),), (("a.w", "d.w"),)):
        assert "pp" not in rules_broken(Layout(pp=2), chain(*tied)) and chain(*tied).stages == 4
    assert chain(("b.w", "c.w")).stages == 1


@given(queries)
def test_every_refusal_says_a_reason_and_its_fields(query: LayoutQuery) -> None:
    for refusal in refusals(query):
        assert refusal.reason and refusal.fields and refusal.nearest.startswith("nearest: ")


@pytest.mark.parametrize(
    ("layout", "facts", "devices", "batch", "rule", "words"),
    [
        (Layout(dp=2, tp=2), LLAMA, 2, 24, "devices", "is 4, not 2 devices; nearest: layout.dp=1"),
        (Layout(dp=4, shard=3), LLAMA, 4, 24, "shard", "shard=3 does not divide dp x cp = 4; nearest: layout.shard=4"),
        (Layout(tp=3), LLAMA, 3, 24, "tp", "tp=3 does not divide kv_heads=4; nearest: layout.tp=2"),
        (Layout(tp=8), LLAMA, 8, 24, "tp", "heads=12, kv_heads=4; nearest: layout.tp=4"),
        (Layout(tp=2), PLAIN, 2, 24, "tp", "no table of logical axes"),
        (Layout(pp=2), PLAIN, 2, 24, "pp", "does not name its blocks"),
        (Layout(pp=2), chain(("a.w", "c.w")), 2, 24, "pp", "blocks.a.w and blocks.c.w are one tensor"),
        (Layout(pp=2), chain(("a.w", "d.w"), ("a.w", "d.v")), 2, 24, "pp", "nearest: layout.pp=1"),
        (Layout(pp=9), LLAMA, 9, 24, "pp", "has 8 blocks to cut between; nearest: layout.pp=8"),
        (Layout(sequence_parallel=True), LLAMA, 1, 24, "sequence_parallel", "tp is 1"),
        (Layout(dp=2, micro_batch=5), LLAMA, 2, 24, "global_batch", "nearest: layout.micro_batch=6"),
        (Layout(dp=5), LLAMA, 5, 24, "global_batch", "nearest: train.global_batch=25"),
        (Layout(cp=2), LLAMA, 2, 24, "offers_cp", f"{NOT_YET}; nearest: layout.cp=1"),
        (Layout(dp=2, ep=2), LLAMA, 2, 24, "offers_ep", f"{NOT_YET}; nearest: layout.ep=1"),
        (Layout(pp=2, vpp=2), LLAMA, 2, 24, "offers_vpp", f"{NOT_YET}; nearest: layout.vpp=1"),
        (Layout(offload=True), LLAMA, 1, 24, "offers_offload", "nearest: layout.offload=false"),
        (Layout(schedule="zbv"), LLAMA, 1, 24, "schedule", "nearest: layout.schedule=1f1b"),
        (Layout(dp=2), NORMED, 2, 24, "stateful_buffers", "norm.running_mean"),
        (Layout(micro_batch=8), NORMED, 1, 24, "stateful_buffers", "nearest: layout.micro_batch=24"),
        (
            Layout(tp=2, sequence_parallel=True, micro_batch=24),
            NORMED_TP,
            2,
            24,
            "stateful_buffers",
            "nearest: layout.sequence_parallel=false",
        ),
        (
            Layout(recompute="full"),
            NORMED,
            1,
            24,
            "recompute",
            "(norm.running_mean) twice; nearest: layout.recompute=none",
        ),
        (Layout(pp=2), NORMED, 2, 24, "stateful_buffers", "nearest: layout.micro_batch=24 layout.schedule=gpipe"),
        (Layout(pp=4, micro_batch=8), LLAMA, 4, 24, "micro_batches", "a step has 3; nearest: layout.micro_batch=6"),
        (Layout(pp=4, micro_batch=2), LLAMA, 4, 2, "micro_batches", "a step has 1; nearest: layout.schedule=gpipe"),
    ],
)
def test_each_rule_with_its_words(
    layout: Layout, facts: ModelFacts, devices: int, batch: int, rule: str, words: str
) -> None:
    assert words in rules_broken(layout, facts, devices, batch)[rule]


@pytest.mark.parametrize(
    ("layout", "facts", "batch", "framework", "rule", "words"),
    [
        (Layout(cp=3), LLAMA, 24, MEGATRON, "context", "into 6 equal pieces, and it has 64 tokens"),
        (Layout(cp=64), LLAMA, 24, MEGATRON, "context", "it has 64 tokens; nearest: layout.cp=32"),
        (Layout(cp=2), PLAIN, 24, MEGATRON, "context", "has no attention; nearest: layout.cp=1"),
        (Layout(dp=2, ep=2), LLAMA, 24, MEGATRON, "experts", "this model has none; nearest: layout.ep=1"),
        (Layout(dp=6, ep=3), MIXTURE, 24, MEGATRON, "experts", "not divide 8 experts; nearest: layout.ep=2"),
        (Layout(dp=2, ep=4), MIXTURE, 24, MEGATRON, "experts", "does not divide dp x cp = 2; nearest: layout.ep=2"),
        (Layout(dp=4, ep=2), MIXTURE, 24, "torchtitan", "sharded_experts", "shard weights; nearest: layout.shard=2"),
        (
            Layout(dp=2, cp=2, shard=2, ep=4),
            MIXTURE,
            24,
            "torchtitan",
            "sharded_experts",
            "torchtitan spreads ep=4 experts over ranks that shard weights; nearest: layout.shard=4",
        ),
        (Layout(tp=2, pp=2), LLAMA, 24, "deepspeed", "tensor_pipeline", "in a pipeline is not offered by deepspeed"),
        (Layout(vpp=2), LLAMA, 24, MEGATRON, "virtual_stages", "and pp is 1; nearest: layout.vpp=1"),
        (
            Layout(pp=2, vpp=2),
            LLAMA,
            24,
            MEGATRON,
            "virtual_stages",
            "schedule '1f1b' has vpp=1, not 2; nearest: layout.schedule=interleaved",
        ),
        (
            Layout(pp=2, schedule="interleaved"),
            LLAMA,
            24,
            MEGATRON,
            "virtual_stages",
            "needs vpp of 2 or more, not 1; nearest: layout.vpp=2",
        ),
        (
            Layout(pp=2, vpp=2, schedule="interleaved", micro_batch=8),
            LLAMA,
            24,
            MEGATRON,
            "micro_batches",
            "a multiple of 2 micro-batches, and a step has 3; nearest: layout.micro_batch=",
        ),
        (Layout(pp=4, vpp=4, schedule="interleaved"), LLAMA, 24, MEGATRON, "pp", "8 blocks to cut"),
        (
            Layout(dp=2, shard=2, pp=2, vpp=2, schedule="zbv"),
            LLAMA,
            24,
            "torchtitan",
            "split_backward",
            "(dp x cp = 2); nearest: layout.schedule=gpipe layout.vpp=1",
        ),
        (
            Layout(pp=2, vpp=2, schedule="dualpipev", micro_batch=12),
            LLAMA,
            24,
            "torchtitan",
            "micro_batches",
            "dualpipev over pp=2 stages needs 4 micro-batches, and a step has 2; nearest: layout.micro_batch=6",
        ),
        (Layout(tp=2), LLAMA, 24, "torchtitan", "sequence_parallel", "only with sequence parallelism; nearest: "),
        (Layout(dp=2, cp=2), LLAMA, 24, "torchtitan", "shard", "over all cp=2 ranks at least; nearest: layout.shard=2"),
        (
            Layout(dp=2, tp=2, ep=2),
            MIXTURE,
            24,
            MEGATRON,
            "sequence_parallel",
            "beside experts that are spread; nearest: layout.sequence_parallel=true",
        ),
        (Layout(pp=2), LLAMA, 24, "llm-foundry", "offers_pp", "a pipeline is not offered by llm-foundry"),
        (Layout(pp=2, schedule="zbv"), LLAMA, 24, MEGATRON, "schedule", "'zbv' is not offered by megatron-lm"),
        (Layout(recompute="selective"), LLAMA, 24, "llm-foundry", "recompute", "nearest: layout.recompute=full"),
        (
            Layout(recompute="selective"),
            PLAIN,
            24,
            MEGATRON,
            "recompute",
            "of megatron-lm drops attention alone, and this model has no attention; nearest: layout.recompute=full",
        ),
    ],
)
def test_rules_of_other_frameworks(
    layout: Layout, facts: ModelFacts, batch: int, framework: str, rule: str, words: str
) -> None:
    assert words in rules_broken(layout, facts, batch=batch, framework=framework)[rule]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, cp=2, pp=2, vpp=2, schedule="interleaved"),
        Layout(dp=2, shard=4, cp=2),
        Layout(pp=4, micro_batch=12),  # fewer micro-batches than stages: Megatron's 1F1B runs them
        Layout(tp=2, sequence_parallel=True, offload=True, recompute="full"),
    ],
)
def test_what_another_framework_offers_is_not_refused(layout: Layout) -> None:
    assert rules_broken(layout, framework="megatron-lm") == {}


def test_a_vocabulary_that_the_framework_pads_is_divided_by_any_tp() -> None:
    """Megatron pads GPT-2's 50,257 words to a multiple of 128 x tp; heads and widths are still divided evenly."""
    gpt2 = ModelFacts.of(card(LlamaShape(6, 48, 12, 4, 4, 96, 50257), 64))
    padding = [name for name, row in FRAMEWORKS.items() if row.vocab_multiple > 1]
    assert {"megatron-lm", "megatron-bridge", "nemo"} <= set(padding)
    for name, row in FRAMEWORKS.items():
        if "tp" in row.offers.fields:
            layout = Layout(tp=2, sequence_parallel=row.offers.sequence_always)
            words = rules_broken(layout, gpt2, framework=name)
            assert (words == {}) == (name in padding), (name, words)
            assert gpt2.tensor_parallel_sizes(8, row) == ([1, 2, 4] if name in padding else [1])
    refused = rules_broken(Layout(tp=8), gpt2, framework=MEGATRON)["tp"]
    assert refused == "tp=8 does not divide heads=12, kv_heads=4; nearest: layout.tp=4"
    assert "vocab=50257; nearest: layout.tp=1" in rules_broken(Layout(tp=2), gpt2)["tp"]


@pytest.mark.parametrize("name", ["meshwright", "torchtitan"])
def test_selective_recompute_that_keeps_products_needs_no_attention(name: str) -> None:
    assert rules_broken(Layout(recompute="selective"), PLAIN, framework=name) == {}


@pytest.mark.parametrize("name", ["megatron-lm", "megatron-bridge", "deepspeed"])
def test_weights_are_not_sharded_in_a_pipeline_where_the_optimizer_is(name: str) -> None:
    (words,) = rules_broken(Layout(dp=4, shard=4, pp=2), framework=name).values()
    assert "cannot shard weights in a pipeline" in words and "layout.shard=1" in words
    (words,) = rules_broken(Layout(dp=8, shard=4), framework=name).values()
    assert "over part of dp x cp = 8" in words
    assert rules_broken(Layout(dp=4, shard=4, pp=2), framework="torchtitan") == {}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(dp=2, shard=2, tp=2, pp=2, sequence_parallel=True),
        Layout(dp=4, shard=2, micro_batch=3),
        Layout(pp=8, schedule="gpipe", recompute="selective"),
        Layout(tp=4, recompute="full"),
    ],
)
def test_what_is_offered_is_not_refused(layout: Layout) -> None:
    assert rules_broken(layout) == {}


def test_a_whole_batch_in_one_place_may_have_running_statistics() -> None:
    assert rules_broken(Layout(pp=2, micro_batch=24, schedule="gpipe"), NORMED) == {}


def test_tied_embeddings_may_be_cut_apart() -> None:
    tied = ModelFacts.of(card(LlamaShape(2, 48, 12, 4, 4, 96, 240, tied=True), 64))
    assert rules_broken(Layout(pp=4), tied) == {}


def test_the_table_has_a_sentence_for_every_rule() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.says for rule in RULES)
