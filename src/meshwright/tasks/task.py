"""What every task answers; the training loop knows nothing else of what is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from meshwright.nn import Split

#: Target that is not counted, as in torch's cross_entropy.
IGNORED = -100


@dataclass(frozen=True)
class Totals:
    """Sums over held-out batches, from which metrics follow: counted units, the bytes of their text, and extras."""

    units: int
    text_bytes: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """The meaning of a batch. `unit` is what is counted, "tokens" or "samples"; `extra_names` are the keys of
    `extras`."""

    name: str
    unit: str
    extra_names: tuple[str, ...]

    def inputs(self, batch: Mapping[str, Any], device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
        """What the model's first block gets (x), and what every block gets beside it. Arrays become tensors."""
        ...

    def targets(self, batch: Mapping[str, Any], device: torch.device | str = "cpu") -> Tensor:
        """int64, IGNORED where nothing is counted."""
        ...

    def loss_sum(self, output: Tensor, targets: Tensor, split: Split | None = None) -> Tensor:
        """fp32 scalar: the loss summed over counted targets. `split`: an nn.Split when classes are split over ranks."""
        ...

    def count(self, targets: Tensor) -> int:
        """Counted targets."""
        ...

    def extras(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        """Further sums for `Totals.sums`, from unsplit outputs; {} if the task has none."""
        ...

    def metrics(self, loss_per_unit: float, totals: Totals) -> dict[str, float]:
        """What a person reads beside the loss."""
        ...


def count_targets(targets: Tensor) -> int:
    return int((targets != IGNORED).sum())
