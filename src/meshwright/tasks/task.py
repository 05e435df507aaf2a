"""The Task: all that the training loop knows of what is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from meshwright.nn import Split, to_device
from meshwright.nn.loss import IGNORED


@dataclass(frozen=True)
class Totals:
    """Sums over held-out batches, for metrics: counted units, the bytes of their text, and extras."""

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
        """The input of the model's first block, and the keyword inputs of every block. Arrays become tensors."""
        ...

    def targets(self, batch: Mapping[str, Any], device: torch.device | str = "cpu") -> Tensor:
        """int64, IGNORED where a target does not count."""
        return to_device(batch["targets"], device)

    def loss_sum(self, output: Tensor, targets: Tensor, split: Split | None = None) -> Tensor:
        """fp32 scalar: the loss summed over counted targets. `split`: how classes are split over ranks, if they are."""
        ...

    def count(self, batch: Mapping[str, Any]) -> int:
        """The number of targets that count, counted on the host."""
        return int((batch["targets"] != IGNORED).sum())

    def extras(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Further sums for `Totals.sums`, from unsplit outputs: scalars on their device."""
        return {}

    def metrics(self, loss_per_unit: float, totals: Totals) -> dict[str, float]:
        """Figures for people beside the loss."""
        ...
