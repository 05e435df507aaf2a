"""Matrix products with weights laid out once for the machine: what decoding spends nearly all its time in."""

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
    """Whether oneDNN can hold weights of `dtype` in its own blocked layout here (about twice as fast at batch 1)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class Linear:
    """y = x W^T + b for a weight W [columns, inner], kept packed where that is possible and plain elsewhere.

    The weight is copied into oneDNN's layout, so the caller may drop its own. Both ways compute the same; packing
    changes the order of additions only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = packs(weight.dtype, weight.device)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self._packed else weight

    @property
    def place(self) -> tuple[int, int]:
        """Where the weight lies in this process's memory: (address, bytes)."""
        if self._packed:
            return torch.ops.mkldnn.data_ptr(self._weight), torch.ops.mkldnn._nbytes(self._weight)
        return self._weight.data_ptr(), self._weight.nbytes

    def plain(self) -> MatMul:
        """x -> x W^T + b."""
        weight, bias = self._weight, self._bias
        if not self._packed:
            return lambda x: F.linear(x, weight, bias)
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: run(x, weight, bias, "none", [], "")

    def silu(self) -> MatMul:
        """x -> silu(x W^T + b)."""
        weight, bias = self._weight, self._bias
        if not self._packed:
            return lambda x: F.silu(F.linear(x, weight, bias))
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: run(x, weight, bias, "swish", [], "")

    def times(self) -> FusedMatMul:
        """x, y -> (x W^T + b) * y."""
        return self._with("mul")

    def plus(self) -> FusedMatMul:
        """x, y -> (x W^T + b) + y."""
        return self._with("add")

    def _with(self, operation: str) -> FusedMatMul:
        weight, bias = self._weight, self._bias
        if not self._packed:
            join = torch.add if operation == "add" else torch.mul
            return lambda x, y: join(F.linear(x, weight, bias), y)
        run = torch.ops.mkldnn._linear_pointwise.binary
        return lambda x, y: run(x, y, weight, bias, operation)
