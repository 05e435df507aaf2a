"""Tensor parallelism as in Megatron (arXiv 1909.08053, 2205.05198), by the table of logical axes.

Weights become plain local slices. A region, such as an attention or a feed-forward, opens where its input meets the
first weight split by output and closes at the weight split by input. With sequence parallelism the residual stream
outside regions is split along the sequence: opening gathers it and closing reduce-scatters. Without it, opening is
free and closing all-reduces. The backward pass does the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.layout import Box
from meshwright.nn import Split
from meshwright.placement import regions

SEQUENCE_DIM = 1

# torch 2.13 renamed both; 2.11 knows the old names alone.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_gather(x.contiguous(), SEQUENCE_DIM, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradient.contiguous(), "sum", SEQUENCE_DIM, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x.contiguous(), "sum", SEQUENCE_DIM, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient.contiguous(), SEQUENCE_DIM, ctx.group), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return funcol.all_reduce(gradient.contiguous(), "sum", ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return funcol.all_reduce(x.contiguous(), "sum", group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Region:
    """How activations enter and leave what tensor parallelism splits. x is [B, T or T/tp, ...]."""

    split: Split
    sequence_parallel: bool

    def enter(self, x: Tensor) -> Tensor:
        return self._wait(_Gather if self.sequence_parallel else _SumGradient, x)

    def leave(self, x: Tensor) -> Tensor:
        return self._wait(_ReduceScatter if self.sequence_parallel else _Sum, x)

    def _wait(self, operation: type[torch.autograd.Function], x: Tensor) -> Tensor:
        result: Tensor = operation.apply(x, self.split.group)
        return funcol.wait_tensor(result) if isinstance(result, funcol.AsyncCollectiveTensor) else result


class RowLinear(nn.Linear):
    """A Linear of which this rank holds a slice of the inputs; the partial outputs are summed, the bias added once."""

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        y = self.region.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


def _lookup(embedding: Any, region: Region) -> None:
    def forward(ids: Tensor, **_: Any) -> Tensor:
        weight = embedding.weight
        local = ids - region.split.index * weight.shape[0]
        elsewhere = (local < 0) | (local >= weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), weight)
        return region.leave(rows.masked_fill(elsewhere[..., None], 0.0))

    embedding.forward = forward


def _columns(layer: Any, region: Region) -> None:
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: forward(region.enter(x), *args, **kwargs)


def _rows(linear: Any, region: Region) -> None:
    linear.__class__, linear.region = RowLinear, region


#: What a layer does with its part of a weight, by the dimension that is split.
USES: dict[tuple[type[nn.Module], int], Callable[[Any, Region], None]] = {
    (nn.Embedding, 0): _lookup,  # zeros for ids of other ranks' rows; the parts are summed
    (nn.Linear, 0): _columns,  # some of the outputs, from the whole input
    (nn.Linear, 1): _rows,  # all outputs, from some of the inputs; the parts are summed
}


def split_module(module: nn.Module, dims: Mapping[str, int], region: Region) -> Split | None:
    """Turns `module` (on any device, meta included) into this rank's slice, in place.

    `dims` is `placement.tensor_split` of its card. Returns how the module's output is split along its last dimension,
    None where it is whole. Raises ValueError for a layer that is not in USES.
    """
    output, region_paths = None, regions(dims)
    for path, child in list(module.named_modules()):
        if path in region_paths:
            _columns(child, region)
        dim = dims.get(f"{path}.weight")
        if dim is None:
            continue
        use = next((use for (layer, at), use in USES.items() if isinstance(child, layer) and at == dim), None)
        if use is None:
            raise ValueError(f"{path}.weight: dimension {dim} of a {type(child).__name__}'s weight cannot be split")
        for name, parameter in list(child.named_parameters(recurse=False)):
            if f"{path}.{name}" in dims:
                whole = Box.whole(tuple(parameter.shape))
                shape = whole.split(dims[f"{path}.{name}"], region.split.parts, region.split.index).shape
                setattr(child, name, nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad))
        if use is _columns:
            if path.rpartition(".")[0] in region_paths:
                continue  # the region's input is entered once, for all its layers
            output = region.split
        use(child, region)
    return output
