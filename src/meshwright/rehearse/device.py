"""What is different on the device that a rehearsal stands for: its allocator, its kernels, its sends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from meshwright.nn import Attention

aten = torch.ops.aten

#: CUDA's caching allocator hands out multiples of this; what it hands out is what `max_memory_allocated` counts.
_CUDA_BLOCK_BYTES = 512
_FLASH_ROWS = 128  # flash attention's backward rounds the sequence up to this, and the width of a head to 32


def rounding(kind: str) -> int:
    """Bytes that an allocation is a multiple of. On a CPU tensors are counted as they are."""
    return _CUDA_BLOCK_BYTES if kind == "cuda" else 1


def stand_in_kernels(module: nn.Module, kind: str) -> None:
    """Has the parts of `module` that ask the device of their tensors run what a device of `kind` would: fake tensors
    are on the CPU.

    On a GPU torch takes flash attention in half precision and its memory-efficient one in fp32, and RMS norms are one
    kernel each; on a CPU they are written out, in fp32.
    """
    if kind == "cpu":
        return
    for child in module.modules():
        if isinstance(child, Attention):
            child.forward = attention(kind)  # type: ignore[method-assign]
        elif isinstance(child, nn.RMSNorm) and child.weight is not None:
            child.forward = partial(_norm, child)  # type: ignore[method-assign]


def _norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    result: Tensor = _FusedNorm.apply(x, module.weight)
    return result


class _FusedNorm(torch.autograd.Function):
    """What torch's fused RMS norm takes and keeps: its input and the scale of each row, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def attention(kind: str) -> Callable[..., Tensor]:
    """The kernel that `nn.Attention` would run on a device of `kind`."""
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


class _BufferedSend:
    """A send that keeps its tensor, as gloo's does, until it is freed itself."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self, *timeout: Any) -> Any:
        return self._work.wait(*timeout)


@contextmanager
def holding_sent(kind: str) -> Iterator[None]:
    """Makes sends over the fake process group keep what they send as gloo's do; NCCL's free it once waited for."""
    if kind != "cpu":
        yield
        return
    send = dist.isend

    def isend(tensor: Tensor, *place: Any, **named: Any) -> _BufferedSend:
        return _BufferedSend(send(tensor, *place, **named), tensor)

    dist.isend = distributed_c10d.isend = isend  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.isend = distributed_c10d.isend = send
