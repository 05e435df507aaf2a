"""What is different on the device that a rehearsal stands for: its allocator, its attention, its sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

aten = torch.ops.aten

#: CUDA's caching allocator hands out multiples of this; what it hands out is what `max_memory_allocated` counts.
_CUDA_BLOCK_BYTES = 512
_FLASH_ROWS = 128  # flash attention's backward rounds the sequence up to this, and the width of a head to 32


def rounding(kind: str) -> int:
    """Bytes that an allocation is a multiple of. On a CPU tensors are counted as they are."""
    return _CUDA_BLOCK_BYTES if kind == "cuda" else 1


def attention(kind: str) -> Callable[..., Tensor]:
    """Stands in for `nn.Attention`, which asks the device of its tensors: the kernel that a device of `kind` would run.

    On a GPU torch takes flash attention in half precision and its memory-efficient one in fp32; fake tensors are on the
    CPU and would take neither.
    """
    assert kind == "cuda", kind

    def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.dtype == torch.float32:
            out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[0]
        else:
            out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return out.transpose(1, 2)

    return attend


def inside(kind: str) -> Callable[[Any, Any], int] | None:
    """Bytes that an operation takes and gives back within itself, where that is known and large."""
    return _inside_cuda if kind == "cuda" else None


def _inside_cuda(operation: Any, arguments: Any) -> int:
    """Flash attention's backward adds up dq in fp32 beside a row of sums (FlashAttention-2, arXiv 2307.08691)."""
    if operation is not aten._scaled_dot_product_flash_attention_backward.default:
        return 0
    batch, heads, length, width = arguments[1].shape
    rows = math.ceil(length / _FLASH_ROWS) * _FLASH_ROWS
    return 4 * batch * heads * rows * (math.ceil(width / 32) * 32 + 1)


class _Held:
    """A send under way that keeps its tensor, as gloo's does, until it is let go of itself."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self, *timeout: Any) -> Any:
        return self._work.wait(*timeout)


@contextmanager
def holding_sent(kind: str) -> Iterator[None]:
    """Makes sends over the fake process group keep what they send as gloo's do; NCCL's let go once waited for."""
    if kind != "cpu":
        yield
        return
    send = dist.isend

    def isend(tensor: Tensor, *place: Any, **named: Any) -> _Held:
        return _Held(send(tensor, *place, **named), tensor)

    dist.isend = distributed_c10d.isend = isend  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.isend = distributed_c10d.isend = send
