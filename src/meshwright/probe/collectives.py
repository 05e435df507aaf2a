"""The collectives as `parallel` calls them: torch's functional ones, whose names differ between versions."""

from __future__ import annotations

from typing import Any

import torch.distributed._functional_collectives as funcol
from torch import Tensor

# torch 2.13 renamed both; 2.11 has only the old names.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over the group."""
    return _wait(funcol.all_reduce(x, "sum", group))


def all_gather(x: Tensor, group: Any) -> Tensor:
    """Every rank's `x`, one after another."""
    return _wait(_all_gather(x, 0, group))


def reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """This rank's part of the sum of `x` over the group."""
    return _wait(_reduce_scatter(x, "sum", 0, group))


def _wait(x: Tensor) -> Tensor:
    done: Tensor = funcol.wait_tensor(x)
    return done
