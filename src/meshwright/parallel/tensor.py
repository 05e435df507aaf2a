"""Tensor parallelism, Megatron's way (arXiv 1909.08053, 2205.05198), read off the table of logical axes.

Weights become plain local slices. A region, such as an attention or a feed-forward, opens where its input meets the
first weight split by output and closes at the weight split by input. With sequence parallelism the residual stream
outside regions is split along the sequence: opening gathers it and closing reduce-scatters; without, opening is free
and closing all-reduces. The backward pass does the mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.layout import AXIS_RULES, Box
from meshwright.nn import Split

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
        op = _Gather if self.sequence_parallel else _SumGradient
        result: Tensor = op.apply(x, self.split.group)
        return funcol.wait_tensor(result) if isinstance(result, funcol.AsyncCollectiveTensor) else result

    def leave(self, x: Tensor) -> Tensor:
        op = _ReduceScatter if self.sequence_parallel else _Sum
        result: Tensor = op.apply(x, self.split.group)
        return funcol.wait_tensor(result) if isinstance(result, funcol.AsyncCollectiveTensor) else result


class RowLinear(nn.Linear):
    """A Linear of which this rank holds a slice of the inputs; the partial outputs are summed, the bias added once."""

    region: Region

    def forward(self, x: Tensor) -> Tensor:
        y = self.region.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


def vocabulary_lookup(weight: Tensor, ids: Tensor, region: Region) -> Tensor:
    """Rows of an embedding table split by vocabulary: ids outside this rank's part contribute zero."""
    local = ids - region.split.index * weight.shape[0]
    elsewhere = (local < 0) | (local >= weight.shape[0])
    found = F.embedding(local.masked_fill(elsewhere, 0), weight)
    return region.leave(found.masked_fill(elsewhere[..., None], 0.0))


@dataclass(frozen=True)
class TensorSplit:
    """What `split_module` did: each parameter's box, the parameters whose gradients are partial sums over the
    tensor-parallel ranks, and whether the module's output is split along its last dimension."""

    boxes: dict[str, Box]
    partial: frozenset[str]
    output: Split | None


def split_dim(axes: tuple[str | None, ...]) -> int | None:
    """The dimension that AXIS_RULES gives to tensor parallelism, or None."""
    for dim, axis in enumerate(axes):
        if axis is not None and AXIS_RULES[axis] == "tp":
            return dim
    return None


def split_module(module: nn.Module, axes: Mapping[str, tuple[str | None, ...]], region: Region) -> TensorSplit:
    """Turns `module` (on any device, meta included) into this rank's slice, in place.

    `axes` names the logical axes of each parameter. Linear and Embedding weights may be split; what else has a split
    axis raises ValueError.
    """
    split = region.split
    boxes: dict[str, Box] = {}
    inside: set[str] = set()
    output: Split | None = None
    parents = dict(module.named_modules())
    opened: dict[str, bool] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        box = Box.whole(tuple(parameter.shape))
        dim = split_dim(axes[name]) if name in axes else None
        boxes[name] = box if dim is None else box.split(dim, split.parts, split.index)
    for path, child in list(parents.items()):
        weight = f"{path}.weight"
        dim = split_dim(axes[weight]) if weight in axes else None
        if dim is None:
            continue
        _slice(child, boxes, path)
        parent = path.rpartition(".")[0]
        if isinstance(child, nn.Embedding):
            child.forward = _lookup(child, region)  # type: ignore[method-assign]
        elif not isinstance(child, nn.Linear):
            raise ValueError(f"{weight}: only Linear and Embedding weights can be split, not {type(child).__name__}'s")
        elif dim == 1:
            child.__class__ = RowLinear
            child.region = region  # type: ignore[assignment]
        elif _closes_inside(parents[parent], parent, axes):
            if not opened.get(parent):
                opened[parent] = True
                parents[parent].forward = _entering(parents[parent].forward, region)
                inside |= {f"{parent}.{inner}" for inner, _ in parents[parent].named_parameters()}
        else:
            child.forward = _entering(child.forward, region)  # type: ignore[method-assign]
            output = split
    partial = set()
    for name in boxes:
        path = name.rpartition(".")[0]
        unsplit = boxes[name].shape == boxes[name].global_shape
        after_region = isinstance(parents[path], RowLinear)
        if unsplit and (region.sequence_parallel or (name in inside and not after_region)):
            partial.add(name)
    return TensorSplit(boxes, frozenset(partial), output)


def _closes_inside(parent: nn.Module, path: str, axes: Mapping[str, tuple[str | None, ...]]) -> bool:
    """Whether a direct child of `parent` is split by its input, so that the region ends inside."""
    return any(
        isinstance(child, nn.Linear) and split_dim(axes.get(f"{path}.{name}.weight", ())) == 1
        for name, child in parent.named_children()
    )


def _slice(child: nn.Module, boxes: Mapping[str, Box], path: str) -> None:
    for name, parameter in list(child.named_parameters(recurse=False)):
        shape = boxes[f"{path}.{name}"].shape
        if tuple(parameter.shape) != shape:
            setattr(child, name, nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad))


def _entering(forward: Callable[..., Tensor], region: Region) -> Callable[..., Tensor]:
    def opened(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(region.enter(x), *args, **kwargs)

    return opened


def _lookup(embedding: nn.Embedding, region: Region) -> Callable[..., Tensor]:
    def looked_up(x: Tensor, **_: Any) -> Tensor:
        return vocabulary_lookup(embedding.weight, x, region)

    return looked_up
