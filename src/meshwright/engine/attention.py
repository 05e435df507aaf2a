"""Attention over the key-value cache: one query token per slot when decoding, several when reading a prompt.

Tensor names: N query rows, H query heads, K key heads, G = H / K, D head_dim, S slots, T cached tokens. Queries are
scaled by 1 / sqrt(D) already. A layer's cache is [2, slots, K, length, D], keys first. Where queries are in fp32 over a
cache in bf16, prompts are computed in fp32 and decoding in bf16; what is returned has the queries' type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.engine.scheduler import Segment, Work
from meshwright.nn import to_device

#: q [N, H x D] and a layer's cache -> [N, H x D].
Attend = Callable[[Tensor, Tensor], Tensor]
#: From this many slots on, batched products beat torch's fused attention on a CPU in bf16.
_BATCHED_FROM_SLOTS = 3


@dataclass(frozen=True)
class Heads:
    """The numbers of this rank's heads, and their width."""

    query: int
    key: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.query // self.key


def attention(work: Work, heads: Heads, dtype: torch.dtype, device: torch.device) -> Attend:
    """Attention for the rows of `work`, decoding slots first. Masks, which all layers share, are made once."""
    slots = len(work.tokens)
    decode = decode_attention(work.positions, heads, dtype, device) if slots else None
    if decode is not None and not work.segments:
        return decode
    parts: list[tuple[slice, Attend]] = [(slice(0, slots), decode)] if decode is not None else []
    at = slots
    for segment in work.segments:
        rows = slice(at, at + len(segment.tokens))
        parts.append((rows, prompt_attention(segment, heads, device)))
        at = rows.stop
    return lambda q, cached: torch.cat([attend(q[rows], cached) for rows, attend in parts])


def decode_attention(positions: Sequence[int], heads: Heads, dtype: torch.dtype, device: torch.device) -> Attend:
    """Row s attends to slot s up to `positions[s]`. The query heads of a key head are rows of one product."""
    slots, longest = len(positions), max(positions) + 1
    mask = None
    if min(positions) + 1 < longest:
        reach = to_device(torch.tensor(positions), device)[:, None, None, None]
        beyond = torch.arange(longest, device=device) > reach
        mask = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, -math.inf)  # [S, 1, 1, T]
    if device.type != "cpu" or (dtype is torch.bfloat16 and heads.group > 1 and slots < _BATCHED_FROM_SLOTS):
        return _fused(slots, longest, heads, mask)
    return _batched(slots, longest, heads, mask, keys_first=dtype is torch.bfloat16)


def _fused(slots: int, longest: int, heads: Heads, mask: Tensor | None) -> Attend:
    def attend(q: Tensor, cached: Tensor) -> Tensor:
        keys, values = cached[:, :slots, :, :longest].unbind(0)  # [S, K, T, D] each
        query = q.to(keys.dtype).view(slots, heads.key, heads.group, heads.head_dim)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
        return out.reshape(slots, -1).to(q.dtype)

    return attend


def _batched(slots: int, longest: int, heads: Heads, mask: Tensor | None, keys_first: bool) -> Attend:
    """`keys_first` multiplies keys by queries instead of queries by keys, which oneDNN does faster in bf16."""
    pairs, group, head_dim = slots * heads.key, heads.group, heads.head_dim

    def attend(q: Tensor, cached: Tensor) -> Tensor:
        keys, values = cached[:, :slots].flatten(1, 2)[:, :, :longest].unbind(0)  # [S K, T, D] each, not copied
        query = q.to(keys.dtype).reshape(pairs, group, head_dim)
        if keys_first:
            scores = torch.bmm(keys, query.transpose(1, 2)).transpose(1, 2)
        else:
            scores = torch.bmm(query, keys.transpose(1, 2))
        if mask is not None:
            scores = (scores.unflatten(0, (slots, heads.key)) + mask).flatten(0, 1)
        return torch.bmm(torch.softmax(scores, dim=-1), values).view(slots, -1).to(q.dtype)

    return attend


def prompt_attention(segment: Segment, heads: Heads, device: torch.device) -> Attend:
    """The query tokens of `segment`, causal over the cached tokens of its slot."""
    slot, start, count = segment.slot, segment.start, len(segment.tokens)
    mask = None
    if start:
        key, query = torch.arange(start + count, device=device), torch.arange(count, device=device)
        mask = key <= query[:, None] + start
    group = heads.group

    def attend(q: Tensor, cached: Tensor) -> Tensor:
        keys, values = cached[:, slot, :, : start + count].to(q.dtype).unbind(0)  # [K, T, D] each
        if group > 1:
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        query = q.view(count, -1, heads.head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=1.0
        )
        return out[0].transpose(0, 1).reshape(count, -1)

    return attend
