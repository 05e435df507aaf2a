"""Any decoder-only transformer on paper: dense or a mixture of experts, with grouped or latent attention.

For planning models that we may not train: from a shape (decoder_shape.py) follow parameters, products and what each
framework keeps for the backward pass (decoder_saved.py). Shapes come from a measured case or a Hugging Face config
(decoder_hf.py).
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.card import AttentionShape, Block, Card, Experts, Parameter, Product
from meshwright.families.decoder_saved import (
    block_activations,
    embedding_activations,
    head_activations,
    join_activations,
)
from meshwright.families.decoder_shape import DecoderShape

#: Norm -> its parameters.
NORMS: dict[str, tuple[str, ...]] = {
    "rms": ("weight",),
    "layer": ("weight", "bias"),
    "layer_nobias": ("weight",),
    "bare": (),
}


def parameters(shape: DecoderShape) -> tuple[Parameter, ...]:
    """All parameters in module order with their logical axes; a tied output head is not listed twice."""
    table = list(_embedding(shape))
    for layer in range(shape.layers):
        table += layer_parameters(shape, f"blocks.{layer}.", mixed=shape.mixed(layer))
    for index in range(shape.mtp_layers):
        table += _mtp_parameters(shape, f"blocks.mtp{index}.")
    return tuple(table + _head(shape))


def layer_parameters(shape: DecoderShape, at: str, *, mixed: bool) -> list[Parameter]:
    """Parameters of one layer under the prefix `at`, in module order."""
    table = _norm(shape, at + "attn_norm")
    table += _latent_attention(shape, at) if shape.latent else _attention(shape, at)
    if shape.sinks:
        table.append(Parameter(at + "attn.sinks", (shape.heads,), ("heads",)))
    if shape.norms >= 2:
        table += _norm(shape, at + "ffn_norm")
    if shape.norms == 4:
        table += _norm(shape, at + "attn_out_norm") + _norm(shape, at + "ffn_out_norm")
    return table + (_mixture(shape, at) if mixed else _feed_forward(shape, at + "ffn", shape.ffn))


def _norm(shape: DecoderShape, at: str, size: int = 0, axis: str = "embed") -> list[Parameter]:
    return [Parameter(f"{at}.{leaf}", (size or shape.hidden,), (axis,)) for leaf in NORMS[shape.norm]]


def _linear(at: str, rows: int, inner: int, axes: tuple[str | None, str | None], bias: bool) -> list[Parameter]:
    table = [Parameter(at + ".weight", (rows, inner), axes)]
    return [*table, Parameter(at + ".bias", (rows,), axes[:1])] if bias else table


def _embedding(shape: DecoderShape) -> list[Parameter]:
    width = shape.embed_width or shape.hidden
    table = [Parameter("blocks.embed.weight", (shape.vocab, width), ("vocab", "embed"))]
    if shape.learned_positions:
        size = (shape.learned_positions, shape.hidden)
        table.append(Parameter("blocks.embed.positions.weight", size, ("positions", "embed")))
    if width != shape.hidden:
        table += _linear("blocks.embed.project", shape.hidden, width, ("embed", None), False)
    return table + (_norm(shape, "blocks.embed.norm") if shape.embedding_norm else [])


def _head(shape: DecoderShape) -> list[Parameter]:
    width = shape.embed_width or shape.hidden
    table = _norm(shape, "blocks.head.norm") if shape.final_norm else []
    if width != shape.hidden:
        table += _linear("blocks.head.project", width, shape.hidden, (None, "embed"), False)
    if not shape.tied:
        table.append(Parameter("blocks.head.out.weight", (shape.vocab, width), ("vocab", "embed")))
    if shape.bias("head"):
        table.append(Parameter("blocks.head.out.bias", (shape.vocab,), ("vocab",)))
    return table


def _attention(shape: DecoderShape, at: str) -> list[Parameter]:
    q, kv, hidden = shape.q_width, shape.kv_width, shape.hidden
    table: list[Parameter] = []
    for name, rows, axis in (("q", q, "heads"), ("k", kv, "kv_heads"), ("v", kv, "kv_heads")):
        table += _linear(f"{at}attn.{name}", rows, hidden, (axis, "embed"), shape.bias("qkv"))
    table += _linear(at + "attn.o", hidden, q, ("embed", "heads"), shape.bias("out"))
    if shape.qk_norm == "full":
        table += _norm(shape, at + "attn.q_norm", q, "heads")
        return table + _norm(shape, at + "attn.k_norm", kv, "kv_heads")
    if shape.qk_norm:
        for name in ("q_norm", "k_norm"):
            table += _norm(shape, f"{at}attn.{name}", shape.head_dim, "head_dim")
    return table


def _latent_attention(shape: DecoderShape, at: str) -> list[Parameter]:
    """DeepSeek-V2's: queries and keys/values each through a low rank with a norm; all heads share the rotary key."""
    hidden, table = shape.hidden, []
    if shape.q_lora:
        table += _linear(at + "attn.q_down", shape.q_lora, hidden, ("latent", "embed"), shape.bias("qkv"))
        table += [Parameter(at + "attn.q_down_norm.weight", (shape.q_lora,), ("latent",))]
        table += _linear(at + "attn.q", shape.q_width, shape.q_lora, ("heads", "latent"), False)
    else:
        table += _linear(at + "attn.q", shape.q_width, hidden, ("heads", "embed"), False)
    rows = shape.kv_lora + shape.rope_head_dim
    table += _linear(at + "attn.kv_down", rows, hidden, ("latent", "embed"), shape.bias("qkv"))
    table += [Parameter(at + "attn.kv_down_norm.weight", (shape.kv_lora,), ("latent",))]
    rows = shape.heads * (shape.head_dim + shape.value_dim)
    table += _linear(at + "attn.kv", rows, shape.kv_lora, ("heads", "latent"), False)
    return table + _linear(at + "attn.o", hidden, shape.out_width, ("embed", "heads"), shape.bias("out"))


def _feed_forward(shape: DecoderShape, at: str, width: int) -> list[Parameter]:
    table: list[Parameter] = []
    for name in ("gate", "up") if shape.gated else ("up",):
        table += _linear(f"{at}.{name}", width, shape.hidden, ("ffn", "embed"), shape.bias("ffn"))
    return table + _linear(f"{at}.down", shape.hidden, width, ("embed", "ffn"), shape.bias("ffn"))


def _mixture(shape: DecoderShape, at: str) -> list[Parameter]:
    """A router, the experts with one tensor per matrix, and the experts that all tokens share."""
    count, width, hidden = shape.experts, shape.expert_ffn or shape.ffn, shape.hidden
    table = _linear(at + "moe.router", count, hidden, (None, "embed"), shape.bias("router"))
    for name in ("gate", "up") if shape.gated else ("up",):
        table.append(Parameter(f"{at}moe.{name}.weight", (count, width, hidden), ("expert", "expert_ffn", "embed")))
        if shape.bias("ffn"):
            table.append(Parameter(f"{at}moe.{name}.bias", (count, width), ("expert", "expert_ffn")))
    table.append(Parameter(at + "moe.down.weight", (count, hidden, width), ("expert", "embed", "expert_ffn")))
    if shape.bias("ffn"):
        table.append(Parameter(at + "moe.down.bias", (count, hidden), ("expert", "embed")))
    if shape.shared_ffn:
        table += _feed_forward(shape, at + "moe.shared", shape.shared_ffn)
    if shape.shared_gate:
        table += _linear(at + "moe.shared_gate", 1, hidden, (None, "embed"), False)
    return table


def _mtp_parameters(shape: DecoderShape, at: str) -> list[Parameter]:
    """A layer that predicts a further token: two norms, the join of state and embedding, a layer, a last norm."""
    table = _norm(shape, at + "token_norm") + _norm(shape, at + "state_norm")
    table += _linear(at + "join", shape.hidden, 2 * shape.hidden, ("embed", None), False)
    table += layer_parameters(shape, at, mixed=shape.experts > 0)
    return table + _norm(shape, at + "norm")


def card(shape: DecoderShape, seq_len: int, style: str = "plain") -> Card:
    """The Card for sequences of `seq_len` tokens. `style` is the framework, which decides what is kept for backward.

    "plain" is eager PyTorch as in our modules, "titan" as in torchtitan's; "megatron" is Megatron-Core with Transformer
    Engine's fused kernels, "megatron-legacy" the unfused attention of 2022; "hf" and "fsdp" are eager blocks as in
    Hugging Face's. Options follow a "+" (decoder_saved.OPTIONS). Raises KeyError for another word.
    """
    t, h = seq_len, shape.hidden
    by_block: dict[str, list[Parameter]] = {}
    for parameter in parameters(shape):
        by_block.setdefault(parameter.name.split(".")[1], []).append(parameter)
    plain, mixed = (_layer(shape, t, style, mixed) for mixed in (False, True))
    blocks = [
        Block(
            "embed",
            "embedding",
            tuple(by_block["embed"]),
            saved=embedding_activations(shape, t, style),
            output_elements=t * h,
            elementwise_elements=2 * t * h,
        )
    ]
    for index in range(shape.layers):
        layer = mixed if shape.mixed(index) else plain
        blocks.append(replace(layer, name=str(index), parameters=tuple(by_block[str(index)])))
    for index in range(shape.mtp_layers):
        mtp = _mtp(shape, t, style, mixed if shape.experts else plain)
        blocks.append(replace(mtp, name=f"mtp{index}", parameters=tuple(by_block[f"mtp{index}"])))
    out = Product("head.out", t, shape.embed_width or h, shape.vocab, "vocab")
    blocks.append(
        Block(
            "head",
            "head",
            tuple(by_block.get("head", ())),
            products=(out,),
            saved=head_activations(shape, t, style),
            output_elements=t * shape.vocab,
            elementwise_elements=4 * t * h + 6 * t * shape.vocab,
        )
    )
    kind = shape.hf_type or ("moe" if shape.experts else "decoder")
    return Card(
        name=f"{kind} {shape.layers}x{shape.hidden}",
        blocks=tuple(blocks),
        unit="tokens",
        units_per_sample=t,
        tied=(("blocks.embed.weight", "blocks.head.out.weight"),) if shape.tied else (),
        splittable=frozenset({"pp", "tp"}),
    )


def _layer(shape: DecoderShape, t: int, style: str, mixed: bool) -> Block:
    """A layer without its name and parameters, which equal layers share."""
    products = [*_attention_products(shape, t), *_ffn_products(shape, t, mixed)]
    heads, kv = shape.heads, shape.heads if shape.latent else shape.kv_heads
    value = shape.value_dim if shape.value_dim != shape.key_dim else 0
    attention = AttentionShape(heads, kv, shape.key_dim, t, value_dim=value, window=shape.sliding_window)
    experts, visits, width = None, 1, shape.ffn
    if mixed:
        width = shape.expert_ffn or shape.ffn
        experts = Experts(shape.experts, shape.top_k, width, shape.shared_ffn, shape.imbalance)
        visits = shape.top_k
    branches = 3 if shape.gated else 2
    elementwise = 8 * t * shape.hidden + 4 * t * (shape.q_width + shape.kv_width)
    elementwise += 2 * branches * t * (visits * width + (shape.shared_ffn if mixed else 0))
    if mixed:
        elementwise += 4 * t * visits * shape.hidden  # tokens copied to experts, and their outputs weighted and added
    saved = block_activations(shape, t, style, mixed)
    kind = "moe" if mixed else "layer"
    return Block("", kind, (), tuple(products), attention, saved, t * shape.hidden, elementwise, experts)


def _attention_products(shape: DecoderShape, t: int) -> list[Product]:
    h = shape.hidden
    out = Product("attn.o", t, shape.out_width, h, "heads")
    if not shape.latent:
        kv = shape.kv_width
        return [
            Product("attn.q", t, h, shape.q_width, "heads"),
            Product("attn.k", t, h, kv, "kv_heads"),
            Product("attn.v", t, h, kv, "kv_heads"),
            out,
        ]
    table = [Product("attn.kv_down", t, h, shape.kv_lora + shape.rope_head_dim)]
    if shape.q_lora:
        table.append(Product("attn.q_down", t, h, shape.q_lora))
    table.append(Product("attn.q", t, shape.q_lora or h, shape.q_width, "heads"))
    table.append(Product("attn.kv", t, shape.kv_lora, shape.heads * (shape.head_dim + shape.value_dim), "heads"))
    return [*table, out]


def _ffn_products(shape: DecoderShape, t: int, mixed: bool) -> list[Product]:
    h, ins = shape.hidden, ("gate", "up") if shape.gated else ("up",)
    if not mixed:
        table = [Product(f"ffn.{name}", t, h, shape.ffn, "ffn") for name in ins]
        return [*table, Product("ffn.down", t, shape.ffn, h, "ffn")]
    rows, width, groups = t * shape.top_k, shape.expert_ffn or shape.ffn, shape.experts
    table = [Product("moe.router", t, h, shape.experts)]
    table += [Product(f"moe.{name}", rows, h, width, "expert_ffn", groups) for name in ins]
    table.append(Product("moe.down", rows, width, h, "expert_ffn", groups))
    if shape.shared_ffn:
        table += [Product(f"moe.shared.{name}", t, h, shape.shared_ffn, "ffn") for name in ins]
        table.append(Product("moe.shared.down", t, shape.shared_ffn, h, "ffn"))
    return table


def _mtp(shape: DecoderShape, t: int, style: str, layer: Block) -> Block:
    """A layer that predicts a further token: beside `layer` it joins two streams and has the output head's product."""
    h = shape.hidden
    return replace(
        layer,
        kind="mtp",
        products=(*layer.products, Product("join", t, 2 * h, h), Product("head.out", t, h, shape.vocab, "vocab")),
        saved=(*layer.saved, *join_activations(shape, t, style), *head_activations(shape, t, style)),
        elementwise_elements=layer.elementwise_elements + 8 * t * h + 6 * t * shape.vocab,
    )
