"""Cross-entropy over a vocabulary that may be split over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Target that is not counted (padding), as in torch.nn.functional.cross_entropy.
IGNORED = -100
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Split:
    """The last dimension of a tensor is split evenly over `group`; this rank holds part `index` of `parts`."""

    group: Any
    index: int
    parts: int


def cross_entropy_sum(logits: Tensor, targets: Tensor, split: Split | None = None) -> Tensor:
    """Sum of -log softmax(logits)[target] over the counted targets, as an fp32 scalar.

    logits [..., V] in any float type, V being this rank's part when `split` is given; targets [...] int64 with
    IGNORED for padding, global ids. With `split` every rank of the group gets the same sum. The gradient is computed
    in the forward pass, some rows at a time, in the type of the logits: the fp32 softmax never exists for all rows.
    """
    result: Tensor = _CrossEntropySum.apply(logits.flatten(0, -2), targets.flatten(), split)
    return result


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, split: Split | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        keep_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if keep_gradient else None
        for start in range(0, logits.shape[0], _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            loss, part = _rows(logits[rows], targets[rows], split, keep_gradient)
            total += loss
            if gradient is not None and part is not None:
                gradient[rows] = part
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        # Scaled in place: the buffer belongs to this node alone and a loss is differentiated once.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(upstream), None, None


def _rows(logits: Tensor, targets: Tensor, split: Split | None, keep_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss sum and gradient of some rows: logits [R, V], targets [R]."""
    x = logits.float()
    peak = x.amax(dim=-1)
    if split is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=split.group)
    counted = targets != IGNORED
    local = targets - split.index * logits.shape[-1] if split is not None else targets
    mine = counted & (local >= 0) & (local < logits.shape[-1])
    index = local.where(mine, 0)[:, None]
    x = x - peak[:, None]
    target_logit = x.gather(1, index)[:, 0].where(mine, 0.0)
    weights = x.exp_()
    normaliser = weights.sum(dim=-1)
    if split is not None:
        both = torch.stack((normaliser, target_logit))
        dist.all_reduce(both, group=split.group)
        normaliser, target_logit = both[0], both[1]
    loss = (normaliser.log() - target_logit).where(counted, 0.0).sum()
    if not keep_gradient:
        return loss, None
    weights *= (counted / normaliser)[:, None]
    weights.scatter_add_(1, index, -mine.to(weights.dtype)[:, None])
    return loss, weights
