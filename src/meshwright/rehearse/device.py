"""How the rehearsed device differs from the CPU that runs the fake tensors: its allocator, kernels and sends."""

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

#: CUDA's caching allocator allocates multiples of this, which `max_memory_allocated` counts.
_CUDA_BLOCK_BYTES = 512
_FLASH_ROWS = 128  # flash attention's backward rounds the sequence up to this, and the head width up to 32


def rounding(kind: str) -> int:
    """Allocations are multiples of this many bytes. On a CPU tensors count with their own size."""
    return _CUDA_BLOCK_BYTES if kind == "cuda" else 1


def stand_in_kernels(module: nn.Module, kind: str) -> None:
    """Makes the parts of `module` that depend on the device run the kernels of a device of `kind`, though fake tensors
    are on the CPU.

    On a GPU torch runs flash attention in half precision and memory-efficient attention in fp32, and an RMS norm is one
    kernel. On a CPU these are sequences of operations, in fp32.
    """
    if kind == "cpu":
        return
    for child in module.modules():
        if isinstance(child, Attention):
            child.forward = _attend  # type: ignore[method-assign]
        elif isinstance(child, nn.RMSNorm) and child.weight is not None:
            child.forward = partial(_norm, child)  # type: ignore[method-assign]


def _norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    result: Tensor = _FusedNorm.apply(x, module.weight)
    return result


class _FusedNorm(torch.autograd.Function):
    """The memory of torch's fused RMS norm: it keeps its input, and the scale of each row in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """`nn.Attention` with the kernels of a GPU."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype == torch.float32:
        out = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[0]
    else:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out.transpose(1, 2)


def workspace(kind: str) -> Callable[[Any, Any], int] | None:
    """(operation, arguments) -> bytes that the operation allocates and frees within itself; None for none."""
    return _cuda_workspace if kind == "cuda" else None


def _cuda_workspace(operation: Any, arguments: Any) -> int:
    """Flash attention's backward accumulates dq in fp32, and a row of sums (FlashAttention-2, arXiv 2307.08691)."""
    if operation is not aten._scaled_dot_product_flash_attention_backward.default:
        return 0
    batch, heads, length, width = arguments[1].shape
    rows = math.ceil(length / _FLASH_ROWS) * _FLASH_ROWS
    return 4 * batch * heads * rows * (math.ceil(width / 32) * 32 + 1)


class _BufferedSend:
    """A send that keeps its tensor until it is freed itself, as gloo's sends do."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self, *timeout: Any) -> Any:
        return self._work.wait(*timeout)


@contextmanager
def buffered_sends(kind: str) -> Iterator[None]:
    """Makes sends of the fake process group keep their tensors on a CPU, as gloo's do. NCCL's free them after wait."""
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
