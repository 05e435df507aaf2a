"""Keys and values of past tokens: one contiguous slot per request, growing by doubling up to a fixed limit."""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.engine.scheduler import Move

_FIRST_LENGTH = 128


class KeyValueCache:
    """`layers` tensors [2, slots, kv_heads, length, head_dim], keys first.

    Grows on demand to max_batch slots of max_len tokens, never past it.

    Slots instead of pages: on a CPU a gather through a page table costs as much as the attention itself. The scheduler
    keeps the slots in use without holes, so a batch of requests is a slice. New rows are zero, so that masked ones
    never have a NaN.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_batch, self.max_len = max_batch, max_len
        self.slots, self.length = 1, min(_FIRST_LENGTH, max_len)
        self._kv_heads, self._head_dim = kv_heads, head_dim
        shape = (2, self.slots, kv_heads, self.length, head_dim)
        self.tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def bytes(self) -> int:
        """Memory in use."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def reserve(self, slots: int, length: int) -> None:
        """Grows the cache to at least `slots` slots of `length` tokens, which must be within the limits."""
        assert slots <= self.max_batch and length <= self.max_len, (slots, length)
        if slots <= self.slots and length <= self.length:
            return
        new_slots = self.slots if slots <= self.slots else min(self.max_batch, max(slots, 2 * self.slots))
        new_length = self.length if length <= self.length else min(self.max_len, max(length, 2 * self.length))
        for index, old in enumerate(self.tensors):
            new = old.new_zeros((2, new_slots, self._kv_heads, new_length, self._head_dim))
            new[:, : self.slots, :, : self.length] = old
            self.tensors[index] = new
        self.slots, self.length = new_slots, new_length

    def apply(self, moves: tuple[Move, ...]) -> None:
        """Applies the scheduler's moves, in order."""
        for move in moves:
            for tensor in self.tensors:
                tensor[:, move.target, :, : move.length] = tensor[:, move.source, :, : move.length]

    def clear(self, keep: tuple[int, ...]) -> None:
        """Sets everything to zero but the first keep[s] tokens of each slot s; nothing if `keep` is empty."""
        for tensor in self.tensors if keep else ():
            for slot, length in enumerate(keep[: self.slots]):
                tensor[:, slot, :, length:] = 0
            tensor[:, len(keep) :] = 0

    def flat(self) -> list[Tensor]:
        """Each layer as rows of one head: [2 x slots x kv_heads x length, head_dim]."""
        return [tensor.view(-1, self._head_dim) for tensor in self.tensors]

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Indices into `flat` of tokens at slots [N], positions [N]: per token the keys of all heads, then values."""
        heads = torch.arange(self._kv_heads, device=slots.device) * self.length
        each = torch.cat((heads, heads + self.slots * self._kv_heads * self.length))
        return ((slots * (self._kv_heads * self.length) + positions)[:, None] + each).view(-1)


def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Cache bytes of one token."""
    return layers * 2 * kv_heads * head_dim * dtype.itemsize
