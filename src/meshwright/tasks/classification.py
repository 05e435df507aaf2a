"""Classification: one class per sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.errors import CannotWork, Problem
from meshwright.nn import Split, to_device
from meshwright.nn.loss import IGNORED
from meshwright.tasks.task import Task, Totals


class Classification(Task):
    """inputs float32 [B, ...] and targets int64 [B]; the model's output is logits [B, classes]."""

    name = "classification"
    unit = "samples"
    extra_names: tuple[str, ...] = ("correct",)

    def inputs(self, batch: Mapping[str, Any], device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
        return to_device(batch["inputs"], device), {}

    def loss_sum(self, output: Tensor, targets: Tensor, split: Split | None = None) -> Tensor:
        if split is not None:
            raise CannotWork(Problem("layout.tp", "a classifier's outputs are not split", "nearest: layout.tp = 1"))
        return F.cross_entropy(output.float(), targets, ignore_index=IGNORED, reduction="sum")

    def extras(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """correct: counted samples whose largest logit is the target's."""
        return {"correct": ((output.argmax(dim=-1) == targets) & (targets != IGNORED)).sum()}

    def metrics(self, loss_per_unit: float, totals: Totals) -> dict[str, float]:
        """accuracy, a fraction of the counted samples."""
        return {"accuracy": totals.sums["correct"] / totals.units} if totals.units else {}
