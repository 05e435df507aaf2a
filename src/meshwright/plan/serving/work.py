"""The work of one decoder layer on one rank (products, experts, keys and values), from the shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from meshwright.families.decoder_shape import DecoderShape


@dataclass(frozen=True)
class Matrix:
    """A product of a layer on one rank: rows x inner by inner x columns."""

    inner: int
    columns: float
    whole: bool = False  # in the precision of activations, whatever that of the weights

    @property
    def elements(self) -> float:
        return self.inner * self.columns


@dataclass(frozen=True)
class LayerWork:
    """One layer on one of `tp` ranks. `cache_elements` counts keys and values per token; `decode_flops` and
    `read_flops` are of one query and one key, while decoding and while reading a prompt."""

    matrices: tuple[Matrix, ...]
    expert_elements: float  # of one expert, a rank's share
    experts: int
    top_k: int
    imbalance: float
    cache_elements: float
    key_heads: int
    decode_flops: float
    read_flops: float
    moved_elements: float  # per row, that norms, activations and residuals read or write


@lru_cache(maxsize=256)
def layer_work(shape: DecoderShape, tp: int, mixed: bool, spread: int = 1) -> LayerWork:
    """The work of a dense or `mixed` layer on one of `tp` ranks; experts are split by another `spread` ranks."""
    h, heads = shape.hidden, shape.heads / tp
    if shape.latent:
        low = shape.kv_lora + shape.rope_head_dim
        matrices = [Matrix(h, low + (shape.q_lora or shape.q_width / tp))]
        matrices += [Matrix(shape.q_lora, shape.q_width / tp)] if shape.q_lora else []
        matrices.append(Matrix(shape.kv_lora, heads * (shape.head_dim + shape.value_dim)))
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
    experts, top_k = (shape.experts, shape.top_k) if mixed else (0, 0)
    return LayerWork(
        matrices=tuple(matrices),
        expert_elements=expert,
        experts=experts,
        top_k=top_k,
        imbalance=shape.imbalance,
        cache_elements=cache,
        key_heads=key_heads,
        decode_flops=decode,
        read_flops=2 * heads * (shape.key_dim + shape.value_dim),
        moved_elements=moved + 2 * top_k * h,
    )


def parameter_count(shape: DecoderShape) -> int:
    """Weights of the products and token tables, without norms and biases (a ten-thousandth of these)."""
    mixed = sum(shape.mixed(layer) for layer in range(shape.layers))
    total = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    for kind, count in ((False, shape.layers - mixed), (True, mixed)):
        if count:
            work = layer_work(shape, 1, kind)
            total += int(count * (sum(m.elements for m in work.matrices) + work.experts * work.expert_elements))
    return total
