"""What one layer of a decoder asks of one rank: products, experts, keys and values. Counted from the shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from meshwright.families.decoder_shape import DecoderShape


@dataclass(frozen=True)
class Matrix:
    """`count` equal products of a layer on one rank: rows x inner by inner x columns."""

    inner: int
    columns: float
    whole: bool = False  # kept in the precision of activations whatever the weights are in

    @property
    def elements(self) -> float:
        return self.inner * self.columns


@dataclass(frozen=True)
class LayerWork:
    """One layer on one of `tp` ranks: products of every row, experts, and what attention reads and computes a token.

    `cache_elements` of keys and values a token; flops of one query against one key, in decoding and in reading.
    """

    matrices: tuple[Matrix, ...]
    expert_elements: float  # of one expert, the share of a rank
    experts: int
    top_k: int
    imbalance: float
    cache_elements: float
    key_heads: int
    decode_flops: float
    read_flops: float
    moved_elements: float  # elements that norms, activations and residuals read or write, a row


@lru_cache(maxsize=256)
def layer_work(shape: DecoderShape, tp: int, mixed: bool, spread: int = 1) -> LayerWork:
    """What a layer, with or without a mixture, is for one of `tp` ranks; experts are split by `spread` ranks more."""
    h, heads = shape.hidden, shape.heads / tp
    if shape.latent:
        low = shape.kv_lora + shape.rope_head_dim
        first = Matrix(h, low + (shape.q_lora or shape.q_width / tp))
        up = [Matrix(shape.q_lora, shape.q_width / tp)] if shape.q_lora else []
        up.append(Matrix(shape.kv_lora, heads * (shape.head_dim + shape.value_dim)))
        matrices = [first, *up]
        cache, key_heads = float(low), 1
        decode = 2 * heads * (low + shape.kv_lora)
    else:
        key_heads = max(1, shape.kv_heads // tp)
        matrices = [Matrix(h, heads * shape.head_dim + 2 * key_heads * shape.head_dim)]
        cache = 2.0 * key_heads * shape.head_dim
        decode = 4 * heads * shape.head_dim
    matrices.append(Matrix(max(1, shape.out_width // tp), h))
    branches = 2 if shape.gated else 1
    visited = 0.0
    if mixed:
        width = shape.expert_ffn or shape.ffn
        matrices.append(Matrix(h, shape.experts, whole=True))
        visited = shape.top_k * width / tp
        expert = (branches + 1) * h * width / tp / spread
        dense = shape.shared_ffn
    else:
        expert, dense = 0.0, shape.ffn
    if dense:
        matrices += [Matrix(h, branches * dense / tp), Matrix(max(1, dense // tp), h)]
    moved = 8 * h + 2 * shape.q_width / tp + 4 * cache + (branches + 1) * (dense / tp + visited)
    return LayerWork(
        tuple(matrices),
        expert,
        shape.experts if mixed else 0,
        shape.top_k if mixed else 0,
        shape.imbalance,
        cache,
        key_heads,
        decode,
        2 * heads * (shape.key_dim + shape.value_dim),
        moved + (2 * shape.top_k * h if mixed else 0),
    )


def parameter_count(shape: DecoderShape) -> int:
    """Weights of the products and token tables; norms and biases, a ten-thousandth of them, left out."""
    mixed = sum(shape.mixed(layer) for layer in range(shape.layers))
    total = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    for kind, count in ((False, shape.layers - mixed), (True, mixed)):
        if count:
            work = layer_work(shape, 1, kind)
            total += int(count * (sum(m.elements for m in work.matrices) + work.experts * work.expert_elements))
    return total
