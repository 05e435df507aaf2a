"""Matrix products with weights laid out once for the machine: nearly all the time of decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

#: x [N, inner] -> [N, columns].
MatMul = Callable[[Tensor], Tensor]
#: x [N, inner] and y [N, columns] -> [N, columns].
FusedMatMul = Callable[[Tensor, Tensor], Tensor]


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has a blocked layout for weights of `dtype` here (about twice as fast at batch 1)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class Linear:
    """y = x W^T + b for a weight W [columns, inner], packed in oneDNN's layout where possible, else plain.

    Packing copies the weight, so the caller may drop its own, and changes only the order of additions.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = packs(weight.dtype, weight.device)
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
            if activation == "swish":
                return lambda x: F.silu(F.linear(x, weight, bias))
            return lambda x: F.linear(x, weight, bias)
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: run(x, weight, bias, activation, [], "")

    def _binary(self, operation: str) -> FusedMatMul:
        weight, bias = self._weight, self._bias
        if not self._packed:
            join = torch.add if operation == "add" else torch.mul
            return lambda x, y: join(F.linear(x, weight, bias), y)
        run = torch.ops.mkldnn._linear_pointwise.binary
        return lambda x, y: run(x, y, weight, bias, operation)
