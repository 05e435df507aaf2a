"""The card of any decoder: counts that others published, logical axes, and what styles keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.families.decoder import DecoderShape, card, parameters
from meshwright.families.decoder_saved import OPTIONS, STYLES
from meshwright.families.llama import card as llama
from meshwright.layout import AXIS_RULES

LLAMA_8B = DecoderShape(32, 4096, 32, 8, 128, 14336, 128256)
MIXTRAL = DecoderShape(32, 4096, 32, 8, 128, 14336, 32000, experts=8, top_k=2)
DEEPSEEK_V3 = DecoderShape(
    layers=61,
    hidden=7168,
    heads=128,
    kv_heads=128,
    head_dim=128,
    ffn=18432,
    vocab=129280,
    experts=256,
    top_k=8,
    expert_ffn=2048,
    shared_ffn=2048,
    first_dense_layers=3,
    q_lora=1536,
    kv_lora=512,
    rope_head_dim=64,
    v_head_dim=128,
)
GPT3 = DecoderShape(
    96, 12288, 96, 96, 128, 49152, 50257, gated=False, tied=True, biases=True, norm="layer", learned_positions=2048
)
SMALL = DecoderShape(2, 64, 8, 2, 8, 96, 200)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        (LLAMA_8B, 8.03),
        (MIXTRAL, 46.7),
        (DEEPSEEK_V3, 671.0),
        (replace(DEEPSEEK_V3, mtp_layers=1), 682.5),
        (GPT3, 174.6),
    ],
    ids=["llama-3-8b", "mixtral-8x7b", "deepseek-v3", "deepseek-v3 with a further token", "gpt-3"],
)
def test_models_have_the_parameters_that_their_authors_state(shape: DecoderShape, billions: float) -> None:
    # arXiv 2407.21783, 2401.04088, 2412.19437 (671 B, and with its own layer for a further token 685 B less that
    # layer's copies of embedding and head), 2005.14165
    assert card(shape, 128).parameter_elements / 1e9 == pytest.approx(billions, rel=0.001)


def test_a_token_of_a_mixture_computes_what_its_experts_do() -> None:
    # DeepSeek-V3 activates 37 B of 671 B parameters a token: two flops each, but for the embedding, attention aside.
    model = card(DEEPSEEK_V3, 1)
    products = sum(product.flops for block in model.blocks for product in block.products)
    assert products / 2 / 1e9 == pytest.approx(37.5 - 0.93, rel=0.01)


def test_a_llama_is_the_same_model_by_either_card() -> None:
    ours = llama.LlamaShape(layers=2, hidden=64, heads=8, kv_heads=2, head_dim=8, ffn=96, vocab=200, qk_norm=True)
    mine, theirs = card(replace(SMALL, qk_norm=True), 32), llama.card(ours, 32)
    assert [(p.name, p.shape, p.axes) for p in mine.parameters] == [
        (p.name, p.shape, p.axes) for p in theirs.parameters
    ]
    assert mine.forward_flops == theirs.forward_flops
    assert [b.name for b in mine.blocks] == [b.name for b in theirs.blocks]


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, experts=4, top_k=2, shared_ffn=16), DEEPSEEK_V3], ids=str)
def test_every_axis_is_in_the_table_and_every_parameter_in_one_block(shape: DecoderShape) -> None:
    table = parameters(shape)
    assert {axis for p in table for axis in p.axes if axis is not None} <= set(AXIS_RULES)
    assert len({p.name for p in table}) == len(table)
    assert card(shape, 8).parameters == table


def test_experts_start_after_the_dense_layers_and_come_every_so_often() -> None:
    shape = replace(SMALL, layers=7, experts=4, top_k=1, first_dense_layers=1, moe_every=2)
    assert [layer for layer in range(7) if shape.mixed(layer)] == [2, 4, 6]
    assert [block.experts is not None for block in card(shape, 8).blocks[1:-1]] == [i in (2, 4, 6) for i in range(7)]


@pytest.mark.parametrize("style", STYLES)
def test_every_style_keeps_more_for_more_tokens_and_drops_some_when_it_recomputes(style: str) -> None:
    for option in ("", *(f"+{name}" for name in OPTIONS)):
        short, long = (card(replace(SMALL, experts=2, top_k=1), t, style + option) for t in (32, 64))
        for few, many in zip(short.blocks[1:], long.blocks[1:], strict=True):
            assert 0 < sum(s.elements for s in few.saved) < sum(s.elements for s in many.saved)


@pytest.mark.parametrize("style", ["eager", "megatron+glue", ""])
def test_an_unknown_style_is_an_error(style: str) -> None:
    with pytest.raises(KeyError):
        card(SMALL, 8, style)


def test_a_window_and_narrow_values_cost_less_attention() -> None:
    whole = card(SMALL, 1024).blocks[1].attention
    part = card(replace(SMALL, sliding_window=128), 1024).blocks[1].attention
    assert whole is not None and part is not None
    # A query sees 128 keys but for the first 128 queries, which see as many as there are.
    assert part.flops / whole.flops == pytest.approx((128 * 1024 - 128**2 / 2) / (1024**2 / 2))
    latent = card(replace(SMALL, kv_lora=16, rope_head_dim=4, v_head_dim=8), 64).blocks[1].attention
    assert latent is not None and (latent.head_dim, latent.value_dim) == (12, 8)
    assert latent.flops == 8 * (12 + 8) * 64 * 64
