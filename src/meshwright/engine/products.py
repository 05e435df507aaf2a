"""Matrix products with weights laid out once for the machine: nearly all the time of decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.cluster import cpu_cluster

#: x [N, inner] -> [N, columns].
MatMul = Callable[[Tensor], Tensor]
#: x [N, inner] and y [N, columns] -> [N, columns].
FusedMatMul = Callable[[Tensor, Tensor], Tensor]

#: Where bf16 is slow, a product of this many rows and more is quicker in fp32 though its weight is widened first: with
#: AVX2 alone 1.3 times at 8 rows, 2.4 times at 16, 7 times at 128; up to 6 rows bf16 is quicker.
WIDE_ROWS = 8
#: Bytes of a weight that exist in fp32 at a time: few enough to stay in the cache until they are multiplied.
WIDENED_BYTES = 4 << 20


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has a blocked layout for weights of `dtype` here (about twice as fast at batch 1)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether steps of `WIDE_ROWS` rows and more are computed in fp32 from weights that stay in `dtype`."""
    return device.type == "cpu" and dtype is torch.bfloat16 and cpu_cluster().device.slow_bf16


class Linear:
    """y = x W^T + b for a weight W [columns, inner], packed in oneDNN's layout where possible, else plain.

    Packing copies the weight, so the caller may drop its own, and changes only the order of additions. With `widens`
    the weight stays plain: x may be in fp32 where W is in bf16, and y is then fp32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, widens: bool = False) -> None:
        self._bias = bias
        self._packed = not widens and packs(weight.dtype, weight.device)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self._packed else weight

    @property
    def place(self) -> tuple[int, int]:
        """The weight's memory in this process: (address, bytes)."""
        if self._packed:
            return torch.ops.mkldnn.data_ptr(self._weight), torch.ops.mkldnn._nbytes(self._weight)
        return self._weight.data_ptr(), self._weight.nbytes

    def plain(self) -> MatMul:
        """x -> x W^T + b."""
        return self._unary("none")

    def silu(self) -> MatMul:
        """x -> silu(x W^T + b)."""
        return self._unary("swish")

    def times(self) -> FusedMatMul:
        """x, y -> (x W^T + b) * y."""
        return self._binary("mul")

    def plus(self) -> FusedMatMul:
        """x, y -> (x W^T + b) + y."""
        return self._binary("add")

    def _unary(self, activation: str) -> MatMul:
        weight, bias = self._weight, self._bias
        if not self._packed:
            return (lambda x: F.silu(self._product(x))) if activation == "swish" else self._product
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: run(x, weight, bias, activation, [], "")

    def _binary(self, operation: str) -> FusedMatMul:
        weight, bias = self._weight, self._bias
        if not self._packed:
            join = torch.add if operation == "add" else torch.mul
            return lambda x, y: join(self._product(x), y)
        run = torch.ops.mkldnn._linear_pointwise.binary
        return lambda x, y: run(x, y, weight, bias, operation)

    def _product(self, x: Tensor) -> Tensor:
        """x W^T + b in the element type of x, to which blocks of rows of W are widened one after another."""
        weight, bias = self._weight, self._bias
        if x.dtype is weight.dtype:
            return F.linear(x, weight, bias)
        rows = max(1, WIDENED_BYTES // (x.element_size() * weight.shape[1]))
        out = x.new_empty(x.shape[0], weight.shape[0])
        for block, part in zip(weight.split(rows), out.split(rows, dim=1), strict=True):
            torch.mm(x, block.to(x.dtype).t(), out=part)
        return out if bias is None else out.add_(bias)
