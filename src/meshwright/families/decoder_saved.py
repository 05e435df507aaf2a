"""The activations of a decoder's block that each framework keeps for the backward pass, tensor by tensor.

A style is one of STYLES, then options joined by "+": the fused operations decide which tensors are kept.
"megatron+dropout+unfused" is Megatron-LM of 2022 (also called "megatron-legacy"): Korthikanti et al. 2022, section 4.
"""

from __future__ import annotations

from meshwright.card import Activation
from meshwright.families.decoder_shape import DecoderShape

STYLES = ("plain", "titan", "megatron", "megatron-legacy", "hf", "fsdp")
#: Options of a style.
OPTIONS = {
    "dropout": "masks of one byte after the embedding, attention and the feed-forward",
    "unfused": "scores of attention written to memory, with dropout of their own where there is dropout",
    "two_outputs": "attention's output in two orders of its dimensions (FlashAttention 2 under Transformer Engine)",
    "mask": "a mask of every query and key, made by the data loader",
    "whole_experts": "tensor parallelism splits the tokens of experts, not their matrices",
    "fused_loss": "logits and their gradient in the compute precision, no fp32 copy: what measured runs hold",
}


class Style:
    """A style from its words. Raises KeyError for a word that is not in STYLES or OPTIONS."""

    def __init__(self, words: str) -> None:
        base, *options = words.split("+")
        unknown = ({base} - set(STYLES)) | (set(options) - set(OPTIONS))
        if unknown:
            raise KeyError(f"{words}: {', '.join(sorted(unknown))}")
        legacy = base == "megatron-legacy"
        self.megatron, self.titan = base.startswith("megatron"), base == "titan"
        self.options = frozenset(options) | (frozenset({"dropout", "unfused"}) if legacy else frozenset())

    def __contains__(self, option: str) -> bool:
        return option in self.options


def block_activations(shape: DecoderShape, t: int, words: str, mixed: bool) -> tuple[Activation, ...]:
    """Activations of one sample of `t` tokens in a layer, or in one with experts (`mixed`)."""
    style, h = Style(words), shape.hidden
    table = [*_norm(shape, t, "attn_norm", style), _product_input("qkv input", t * h, style)]
    table += _latent(shape, t, style) if shape.latent else []
    table += _attention(shape, t, style)
    table += _mask("attention's dropout", t * h, style)
    if shape.norms > 1:
        table += [*_norm(shape, t, "ffn_norm", style), _product_input("ffn input", t * h, style)]
    if shape.norms == 4:
        table += [*_norm(shape, t, "attn_out_norm", style), *_norm(shape, t, "ffn_out_norm", style)]
    table += _mixture(shape, t, style) if mixed else _feed_forward("ffn", shape.ffn, t, shape.gated, style)
    if style.titan:
        table += _between_products(t * h)
    return (*table, *_mask("feed-forward's dropout", t * h, style))


def _between_products(elements: int) -> list[Activation]:
    """What torchtitan's selective recompute keeps besides every second product: the result of the last product, sums
    over tensor-parallel ranks, and the layer's input."""
    return [
        Activation("layer input", elements, "sp", on="selective"),
        Activation("last product", elements, on="selective"),
        Activation("sums over tensor-parallel ranks", 2 * elements, "sp", on="selective tp"),
    ]


def embedding_activations(shape: DecoderShape, t: int, words: str) -> tuple[Activation, ...]:
    """Activations of one sample in the embedding: masks, but not token ids."""
    style = Style(words)
    whole = [Activation("mask of every query and key", t * t, bytes_per_element=1)] if "mask" in style else []
    return (*_mask("embedding's dropout", t * shape.hidden, style), *whole)


def head_activations(shape: DecoderShape, t: int, words: str) -> tuple[Activation, ...]:
    """Activations of one sample in the last norm, the output head and the loss."""
    style = Style(words)
    norm = _norm(shape, t, "norm", style) if shape.final_norm else []
    out_input = _product_input("out input", t * shape.hidden, style)
    if style.titan and "fused_loss" not in style:  # the logits are turned into fp32 whole
        name = "log-softmax of the logits, its gradient and theirs"
        return (*norm, out_input, Activation(name, 3 * t * shape.vocab, "tp", 4, module="loss"))
    if not style.megatron or "fused_loss" in style:
        return (*norm, out_input, Activation("logits and their gradient", 2 * t * shape.vocab, "tp", module="loss"))
    # The logits, and their softmax in fp32; backward, the softmax and the gradient of the logits.
    return (
        *norm,
        out_input,
        Activation("logits", t * shape.vocab, "tp", module="loss"),
        Activation("softmax of the logits", t * shape.vocab, "tp", 4, module="loss"),
    )


def join_activations(shape: DecoderShape, t: int, words: str) -> tuple[Activation, ...]:
    """Activations of one sample where a layer that predicts a further token joins its two streams."""
    style, h = Style(words), shape.hidden
    norms = [*_norm(shape, t, "token_norm", style), *_norm(shape, t, "state_norm", style)]
    return (*norms, _product_input("join input", 2 * t * h, style))


def _product_input(name: str, elements: int, style: Style) -> Activation:
    """The input of a product after a norm. Megatron keeps its own part and gathers again; eager PyTorch keeps the
    gathered input, unless it is recomputed from the norm's input."""
    return Activation(name, elements, "sp" if style.megatron else "", selective=not style.megatron, module="product")


def _norm(shape: DecoderShape, t: int, name: str, style: Style) -> list[Activation]:
    """A norm keeps its input, each token's scale and, except RMS norms, each token's mean."""
    statistics = 1 if shape.norm == "rms" else 2
    return [
        Activation(f"{name} input", t * shape.hidden, "sp", selective=style.titan),
        Activation(f"{name} statistics", t * statistics, "sp", bytes_per_element=4),
    ]


def _mask(name: str, elements: int, style: Style) -> list[Activation]:
    return [Activation(name, elements, "sp", bytes_per_element=1)] if "dropout" in style else []


def _attention(shape: DecoderShape, t: int, style: Style) -> list[Activation]:
    """Queries, keys and values, and the output, which is also the next product's input."""
    q, out = shape.q_width, shape.out_width
    values = shape.heads * (shape.head_dim + shape.value_dim) if shape.latent else shape.kv_width
    table = [
        Activation("q", t * q, "tp"),
        Activation("k", t * shape.kv_width, "tp", selective=style.titan),
        Activation("v", t * values, "tp"),
        Activation("attention output", t * out, "tp", module="product"),
    ]
    if "two_outputs" in style:
        table.append(Activation("attention output in the kernel's order", t * out, "tp"))
    if "unfused" not in style:
        return [*table, Activation("attention log-sum-exp", t * shape.heads, "tp", bytes_per_element=4)]
    scores = shape.heads * t * t
    table.append(Activation("attention probabilities", scores, "tp", selective=True, module="core_attn"))
    if "dropout" in style:
        table.append(Activation("probabilities after dropout", scores, "tp", selective=True, module="core_attn"))
        table.append(Activation("probabilities' dropout", scores, "tp", 1, selective=True, module="core_attn"))
    return table


def _latent(shape: DecoderShape, t: int, style: Style) -> list[Activation]:
    """Latents before and after their norms; they are not split by heads."""
    split = "sp" if style.megatron else ""
    ranks = shape.q_lora + shape.kv_lora
    return [
        Activation("latents", t * (ranks + shape.rope_head_dim), split, module="mla_up_proj"),
        Activation("latents after their norms", t * ranks, split, module="mla_up_proj"),
    ]


def _feed_forward(name: str, width: int, t: int, gated: bool, style: Style) -> list[Activation]:
    if not gated:
        return [
            Activation(f"{name} up", t * width, "tp"),
            Activation(f"{name} activation", t * width, "tp", selective=not style.megatron, module="product"),
        ]
    if style.megatron:  # one kernel from gate and up to their product
        return [
            Activation(f"{name} gate and up", 2 * t * width, "tp"),
            Activation(f"{name} activation", t * width, "tp", module="product"),
        ]
    if style.titan:
        return [
            Activation(f"{name} gate", t * width, "tp"),
            Activation(f"{name} up, silu and product", 3 * t * width, "tp", selective=True),
        ]
    return [
        Activation(f"{name} gate and up", 2 * t * width, "tp"),
        Activation(f"{name} silu and product", 2 * t * width, "tp", selective=True),
    ]


def _mixture(shape: DecoderShape, t: int, style: Style) -> list[Activation]:
    """Scores of the router, inputs of the experts, the experts, and their outputs before weighting."""
    visits, width, h = t * shape.top_k, shape.expert_ffn or shape.ffn, shape.hidden
    tokens = "tp" if "whole_experts" in style else ""
    uneven = int(visits * shape.imbalance)
    table = [
        Activation("router's scores", 2 * t * shape.experts, "sp", bytes_per_element=4),
        Activation("expert input", uneven * h, tokens, module="product"),
    ]
    table += _feed_forward("expert", width, uneven, shape.gated, style)
    table.append(Activation("expert output", visits * h, "sp" if style.megatron else ""))
    return table + (_feed_forward("shared", shape.shared_ffn, t, shape.gated, style) if shape.shared_ffn else [])
