from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from meshwright import tasks
from meshwright.errors import CannotWork, InputError
from meshwright.nn import Split
from meshwright.tasks import Totals


def test_an_unknown_task_names_the_nearest() -> None:
    assert sorted(tasks.TASKS) == ["classification", "language-model"]
    with pytest.raises(InputError, match=r"task\.name.*did you mean 'classification'"):
        tasks.get("clasification")


def test_a_language_model_reads_ids_and_positions_and_counts_what_is_not_padding() -> None:
    task = tasks.get("language-model")
    batch = {
        "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
        "positions": np.array([[0, 1, 2], [0, 1, 2]]),
        "targets": np.array([[2, 3, 4], [5, -100, -100]]),
    }
    x, beside = task.inputs(batch)
    targets = task.targets(batch)
    assert x.tolist() == batch["input_ids"].tolist() and x.dtype == torch.int64
    assert beside["positions"].tolist() == batch["positions"].tolist() and list(beside) == ["positions"]
    assert task.unit == "tokens" and task.count(batch) == 4
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = task.loss_sum(logits, targets)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    (wanted_gradient,) = torch.autograd.grad(wanted, logits)
    assert torch.allclose(gradient, wanted_gradient, atol=1e-6)
    assert task.extras(logits, targets) == {}


def test_bits_per_byte_follows_from_loss_units_and_bytes() -> None:
    task = tasks.get("language-model")
    metrics = task.metrics(math.log(2) * 4, Totals(units=100, text_bytes=200))
    assert metrics["bits_per_byte"] == pytest.approx(2.0) and metrics["perplexity"] == pytest.approx(16.0)
    assert "bits_per_byte" not in task.metrics(1.0, Totals(units=100))
    assert math.isfinite(task.metrics(1e9, Totals(units=1))["perplexity"])


def test_a_uniform_model_of_bytes_costs_eight_bits() -> None:
    task = tasks.get("language-model")
    targets = torch.arange(256)[None]
    loss = task.loss_sum(torch.zeros(1, 256, 256), targets).item() / task.count({"targets": targets})
    assert task.metrics(loss, Totals(units=256, text_bytes=256))["bits_per_byte"] == pytest.approx(8.0)


def test_classification_sums_loss_and_counts_hits_but_for_padding() -> None:
    task = tasks.get("classification")
    batch = {"inputs": np.zeros((4, 8, 8), dtype=np.float32), "targets": np.array([0, 1, 2, -100])}
    x, beside = task.inputs(batch)
    targets = task.targets(batch)
    assert x.shape == (4, 8, 8) and beside == {} and task.unit == "samples" and task.count(batch) == 3
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0], [9.0, 0, 0]], dtype=torch.bfloat16)
    loss = task.loss_sum(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:3].float(), targets[:3], reduction="sum").item())
    extras = task.extras(logits, targets)
    assert {name: value.item() for name, value in extras.items()} == {"correct": 2}
    assert task.metrics(0.0, Totals(units=3, sums={"correct": 2.0})) == {"accuracy": pytest.approx(2 / 3)}
    assert task.metrics(0.0, Totals(units=0, sums={"correct": 0.0})) == {}
    with pytest.raises(CannotWork, match=r"layout.tp.*nearest: layout.tp = 1"):
        task.loss_sum(logits, targets, Split(group=None, index=0, parts=2))
