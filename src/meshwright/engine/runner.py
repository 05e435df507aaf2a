"""The decoder: Llama-family weights, folded and packed for speed, run over a key-value cache.

It computes the same as `families/llama/module.py`, its slow twin in the tests, in fewer and larger steps:

- q, k and v are one product. Silu, the gate and the residual addition are parts of the products before them.
- A norm's weight is folded into the columns of the products that read it, so a norm is three small operations:
  x * sqrt(E) / hypot(|x|, sqrt(eps E)) is x / sqrt(mean(x^2) + eps).
- Rows of q and k are reordered within each head so that the two numbers of a rotation are adjacent, and a rotation is
  one complex product. Scores are sums over the head, so the order does not matter.
- The factor 1 / sqrt(D) of the scores is in the weights that make the queries.
- On a CPU that is slow at bf16, steps of many rows are computed in fp32; weights and cache stay in bf16.

Tensor names: N tokens of a step, E hidden, H query heads, K key heads, D head_dim, S slots, T cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.engine.attention import Attend, Heads, attention
from meshwright.engine.cache import KeyValueCache
from meshwright.engine.pages import use_large_pages
from meshwright.engine.products import WIDE_ROWS, FusedMatMul, Linear, MatMul
from meshwright.engine.ranks import Ranks
from meshwright.engine.scheduler import Work
from meshwright.families.llama.card import LlamaShape
from meshwright.nn import Rotary, to_device

#: A step this small, of a model whose weights fit in a core's share of the cache, is as fast or faster on one thread,
#: and much steadier: its products take microseconds, and threads would wait for each other after each.
_LIGHT_BYTES = 16 << 20
_LIGHT_TOKENS = 2


class PackedLayer:
    """One layer's packed weights. After `qkv` come rotary positions and the cache; `o` and `down` add the residual."""

    __slots__ = ("down", "gate", "head_norm", "o", "qkv", "up")

    def __init__(
        self, qkv: MatMul, head_norm: Tensor | None, o: FusedMatMul, gate: MatMul, up: FusedMatMul, down: FusedMatMul
    ) -> None:
        self.qkv, self.head_norm, self.o, self.gate, self.up, self.down = qkv, head_norm, o, gate, up, down


class Decoder:
    """Runs one `Work` at a time. `weights` are this rank's slices by our parameter names, in the folder's layout.

    `run` returns the logits of the sampled rows [R, vocab] on rank 0 and None on the others. `widens`: steps of
    `WIDE_ROWS` rows and more are computed in fp32, whatever the weights are in.
    """

    def __init__(
        self,
        shape: LlamaShape,
        weights: Mapping[str, Tensor],
        ranks: Ranks,
        max_batch: int,
        max_len: int,
        widens: bool = False,
    ) -> None:
        self.shape, self.ranks, self._widens = shape, ranks, widens
        embed = weights["blocks.embed.weight"]
        self.dtype, self.device = embed.dtype, embed.device
        self.heads = Heads(shape.heads // ranks.world, shape.kv_heads // ranks.world, shape.head_dim)
        self._embed = embed
        self._eps_E = torch.tensor(math.sqrt(shape.norm_eps * shape.hidden), device=self.device)
        self._eps_D = torch.tensor(math.sqrt(shape.norm_eps * shape.head_dim), device=self.device)
        self._rotary_order = torch.arange(shape.head_dim, device=self.device).view(2, -1).t().reshape(-1)
        self._light = self.device.type == "cpu" and sum(w.nbytes for w in weights.values()) <= _LIGHT_BYTES
        self._linears: list[Linear] = []
        self._layers = [self._pack(weights, f"blocks.{index}.") for index in range(shape.layers)]
        out = weights.get("blocks.head.out.weight", embed)
        self._head = self._linear(_fold(out, weights["blocks.head.norm.weight"])).plain()
        if self.device.type == "cpu":
            use_large_pages(linear.place for linear in self._linears)
        self.cache = KeyValueCache(
            shape.layers, self.heads.key, shape.head_dim, max_batch, max_len, self.dtype, self.device
        )
        self._angles = torch.empty(0, 1, shape.head_dim // 2, dtype=torch.complex64, device=self.device)
        self._rotary = Rotary(shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_positions)

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        self._linears.append(Linear(weight.to(self.dtype), bias, self._widens))
        return self._linears[-1]

    def _pack(self, weights: Mapping[str, Tensor], at: str) -> PackedLayer:
        shape, heads = self.shape, self.heads
        scale = 1 / math.sqrt(shape.head_dim)  # of the scores; after a norm of the queries, which would undo it

        def qkv(kind: str) -> Tensor:
            q, k, v = (weights[f"{at}attn.{name}.{kind}"].float() for name in "qkv")
            q, k = self._in_rotary_order(q), self._in_rotary_order(k)
            return torch.cat((q * (1.0 if shape.qk_norm else scale), k, v))

        bias = qkv("bias").to(self.dtype) if shape.bias("qkv") else None
        head_norm = None
        if shape.qk_norm:
            q, k = (weights[f"{at}attn.{name}_norm.weight"][self._rotary_order].float() for name in "qk")
            rows = torch.cat((q.expand(heads.query, -1) * scale, k.expand(heads.key, -1)))
            head_norm = (rows * math.sqrt(shape.head_dim)).to(self.dtype)
        # The residual and the output bias are added once, by rank 0, before the sum over ranks.
        o_bias = weights.get(f"{at}attn.o.bias") if self.ranks.rank == 0 else None
        ffn_norm = weights[f"{at}ffn_norm.weight"]
        return PackedLayer(
            self._linear(_fold(qkv("weight"), weights[f"{at}attn_norm.weight"]), bias).plain(),
            head_norm,
            self._into_residual(self._linear(weights[f"{at}attn.o.weight"], o_bias)),
            self._linear(_fold(weights[f"{at}ffn.gate.weight"], ffn_norm)).silu(),
            self._linear(_fold(weights[f"{at}ffn.up.weight"], ffn_norm)).times(),
            self._into_residual(self._linear(weights[f"{at}ffn.down.weight"])),
        )

    def _in_rotary_order(self, rows: Tensor) -> Tensor:
        """Weight or bias of q or k with each head's rows reordered: i and i + D/2 are adjacent."""
        return rows.unflatten(0, (-1, self.shape.head_dim))[:, self._rotary_order].flatten(0, 1)

    def _into_residual(self, linear: Linear) -> FusedMatMul:
        plus, plain, ranks = linear.plus(), linear.plain(), self.ranks
        if ranks.world == 1:
            return plus
        if ranks.rank == 0:
            return lambda x, residual: ranks.sum(plus(x, residual))
        return lambda x, _: ranks.sum(plain(x))

    @torch.inference_mode()
    def run(self, work: Work) -> Tensor | None:
        """Applies the moves of `work`, then makes one pass over all its tokens."""
        threads = torch.get_num_threads()
        light = self._light and len(work.tokens) + sum(len(s.tokens) for s in work.segments) <= _LIGHT_TOKENS
        if not light or threads == 1:
            return self._run(work)
        torch.set_num_threads(1)
        try:
            return self._run(work)
        finally:
            torch.set_num_threads(threads)

    def _run(self, work: Work) -> Tensor | None:
        self.cache.reserve(work.slots, work.length)
        self.cache.apply(work.moves)
        self.cache.clear(work.keep)
        ids, positions, slot_of = list(work.tokens), list(work.positions), list(range(len(work.tokens)))
        for segment in work.segments:
            ids += segment.tokens
            positions += range(segment.start, segment.start + len(segment.tokens))
            slot_of += [segment.slot] * len(segment.tokens)
        places = to_device(torch.tensor((ids, positions, slot_of)), self.device)
        angles = self._angles_to(self.cache.length)[places[1]]
        rows = self.cache.rows(slots=places[2], positions=places[1])
        attend = attention(work, self.heads, self.dtype, self.device)
        x = self._suited(self._lookup(places[0]))
        for layer, cached, flat in zip(self._layers, self.cache.tensors, self.cache.flat(), strict=True):
            x = self._layer(x, layer, angles, rows, flat, cached, attend)
        return self.ranks.gather(self._head(self._norm(self._suited(self._sampled(x, work)))), self.shape.vocab)

    def _suited(self, x: Tensor) -> Tensor:
        """x [N, E] in the element type that suits a product of N rows."""
        return x.to(torch.float32 if self._widens and x.shape[0] >= WIDE_ROWS else self.dtype)

    def _layer(
        self,
        x: Tensor,
        layer: PackedLayer,
        angles: Tensor,
        rows: Tensor,
        flat: Tensor,
        cached: Tensor,
        attend: Attend,
    ) -> Tensor:
        """x [N, E] -> [N, E]; writes the step's keys and values at `rows` of the flat cache, then attends."""
        head_dim = self.heads.head_dim
        wide = self.heads.query * head_dim
        qkv = layer.qkv(self._norm(x))
        qk = qkv.view(qkv.shape[0], -1, head_dim)[:, : self.heads.query + self.heads.key]
        if layer.head_norm is not None:
            size = torch.linalg.vector_norm(qk, 2, -1, True, dtype=torch.float32)
            qk.div_(size.hypot_(self._eps_D)).mul_(layer.head_norm)
        if qk.dtype is torch.float32:
            torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(angles)
        else:
            exact = qk.float()
            torch.view_as_complex(exact.view(*exact.shape[:-1], -1, 2)).mul_(angles)
            qk.copy_(exact)
        flat.index_copy_(0, rows, qkv[:, wide:].reshape(-1, head_dim).to(flat.dtype))
        x = layer.o(attend(qkv[:, :wide], cached), x)
        h = self._norm(x)
        return layer.down(layer.up(h, layer.gate(h)), x)

    def _norm(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) / sqrt(E); the factor sqrt(E) is in the weights that follow."""
        size = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32).hypot_(self._eps_E)
        return torch.div(x, size) if x.dtype is torch.float32 else torch.div(x, size).to(x.dtype)

    def _lookup(self, ids: Tensor) -> Tensor:
        if self.ranks.world == 1:
            return F.embedding(ids, self._embed)
        rows = self._embed.shape[0]
        local = ids - self.ranks.rank * rows
        mine = (local >= 0) & (local < rows)
        return self.ranks.sum(F.embedding(local.where(mine, 0), self._embed) * mine[:, None])

    def _sampled(self, x: Tensor, work: Work) -> Tensor:
        """The rows of x [N, E] that need logits: decoding slots, then the ends of finished prompts."""
        if not work.segments and len(work.decoding) == len(work.tokens):
            return x
        rows, at = list(work.decoding), len(work.tokens)
        for segment in work.segments:
            at += len(segment.tokens)
            if segment.last:
                rows.append(at - 1)
        return x[to_device(torch.tensor(rows, dtype=torch.int64), self.device)]

    def _angles_to(self, length: int) -> Tensor:
        """exp(i position frequency) x amplitude for positions below `length`, [length, 1, D/2]; grows on demand."""
        if self._angles.shape[0] < length:
            angles = torch.arange(length).float()[:, None] * self._rotary.inv_freq
            turns = torch.polar(torch.full_like(angles, self._rotary.amplitude), angles)
            self._angles = to_device(turns[:, None], self.device)
        return self._angles


def _fold(weight: Tensor, norm: Tensor) -> Tensor:
    """`weight` [R, E] with the norm's weight [E], and the sqrt(E) that `_norm` leaves out, in its columns; in fp32."""
    return weight.float() * (norm.float() * math.sqrt(norm.shape[0]))
