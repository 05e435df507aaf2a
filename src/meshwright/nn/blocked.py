"""Causal attention in blocks of queries, for bf16 on a CPU, where torch's fused kernel falls far behind plain products.

A block of queries is multiplied only by the keys up to its end, which leaves out most of the masked half, in products
that the CPU's bf16 units do at full speed. Its slow twin is torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUERIES_AT_ONCE = 128

#: Up to this length the probabilities are kept for the backward pass. Beyond it they would outgrow the other
#: activations, and are computed again.
KEPT_LENGTH = 512


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D), causal) v for q [B, T, H, D], k and v [B, T, K, D], H a multiple of K -> [B, T, H, D]."""
    batch, length, heads, width = q.shape
    groups = heads // k.shape[2]
    grouped = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).reshape(-1, groups, length, width)
    keys, values = (x.transpose(1, 2).reshape(-1, length, width) for x in (k, v))
    out: Tensor = _Blocked.apply(grouped * width**-0.5, keys, values)
    return out.view(batch, -1, groups, length, width).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _probabilities(rows: Tensor, k: Tensor, start: int, stop: int) -> Tensor:
    """Softmax of queries start..stop, given as rows [N, G * (stop - start), D], over k [N, T, D] up to `stop`."""
    scores = torch.bmm(rows, k[:, :stop].transpose(1, 2))
    queries = stop - start
    future = torch.ones(queries, queries, dtype=torch.bool, device=rows.device).triu(1)
    scores.unflatten(1, (-1, queries))[..., start:].masked_fill_(future, float("-inf"))
    return torch.softmax(scores, dim=-1)


class _Blocked(torch.autograd.Function):
    """q [N, G, T, D], already scaled; k and v [N, T, D] -> [N, G, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        out = torch.empty_like(q)
        kept = []
        for start in range(0, length, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, length)
            p = _probabilities(q[:, :, start:stop].flatten(1, 2), k, start, stop)
            out[:, :, start:stop] = torch.bmm(p, v[:, :stop]).unflatten(1, (-1, stop - start))
            if length <= KEPT_LENGTH:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Blocks add up in fp32: a key gets a term from every block after it.
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for index, start in enumerate(range(0, q.shape[2], QUERIES_AT_ONCE)):
            stop = min(start + QUERIES_AT_ONCE, q.shape[2])
            rows, slope = q[:, :, start:stop].flatten(1, 2), upstream[:, :, start:stop].flatten(1, 2)
            p = kept[index] if kept else _probabilities(rows, k, start, stop)
            dv[:, :stop] += torch.bmm(p.transpose(1, 2), slope)
            dp = torch.bmm(slope, v[:, :stop].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, start:stop] = torch.bmm(ds, k[:, :stop]).unflatten(1, (-1, stop - start))
            dk[:, :stop] += torch.bmm(ds.transpose(1, 2), rows)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
