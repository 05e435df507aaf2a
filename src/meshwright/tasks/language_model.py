"""Next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meshwright.nn import Split, cross_entropy_sum, to_device
from meshwright.tasks.task import Task, Totals


class LanguageModel(Task):
    """input_ids, positions and targets, int64 [B, T]; the model's output is logits [B, T, V]."""

    name = "language-model"
    unit = "tokens"
    extra_names: tuple[str, ...] = ()

    def inputs(self, batch: Mapping[str, Any], device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
        return to_device(batch["input_ids"], device), {"positions": to_device(batch["positions"], device)}

    def loss_sum(self, output: Tensor, targets: Tensor, split: Split | None = None) -> Tensor:
        return cross_entropy_sum(output, targets, split)

    def metrics(self, loss_per_unit: float, totals: Totals) -> dict[str, float]:
        """perplexity, and bits_per_byte = loss sum / ln 2 / bytes of text if these are known."""
        metrics = {"perplexity": math.exp(min(loss_per_unit, 700.0))}
        if totals.text_bytes:
            metrics["bits_per_byte"] = loss_per_unit * totals.units / math.log(2) / totals.text_bytes
        return metrics
