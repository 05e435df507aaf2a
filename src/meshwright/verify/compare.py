"""Compares the recorded gradients of two runs, step by step and tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

#: The difference of a gradient is relative to its norm, but at least to this share of the whole gradient's norm. AdamW
#: turns rounding into full-size steps where a gradient is near zero, and a gradient that is zero in exact arithmetic
#: (the bias of keys, under softmax) is rounding noise on every layout. A fault is far larger.
FLOOR = 0.1


@dataclass(frozen=True)
class Difference:
    """|layout - device| / |device| at one step, of the gradient of one tensor or of the loss."""

    step: int
    tensor: str
    relative: float


@dataclass(frozen=True)
class Comparison:
    """The largest differences, and the first beyond the tolerance (None: equal)."""

    loss: Difference
    gradient: Difference
    first_beyond: Difference | None


def compare(reference: Path, other: Path, losses: list[tuple[float, float]], tolerance: float) -> Comparison:
    """Compares the gradients recorded in two folders, and `losses`: (reference, other) of each step, from step 1.

    Within a step the loss comes first, then the tensors in order of the forward pass. Raises ValueError where the two
    runs recorded different tensors.
    """
    worst_loss = Difference(0, "loss", 0.0)
    worst_gradient = Difference(0, "", 0.0)
    first_beyond: Difference | None = None
    for step, (expected, actual) in enumerate(losses, start=1):
        loss = Difference(step, "loss", _relative(abs(expected - actual), abs(expected)))
        worst_loss = max(worst_loss, loss, key=_order)
        gradients = list(_gradient_differences(step, reference, other))
        worst_gradient = max([worst_gradient, *gradients], key=_order)
        if first_beyond is None:
            first_beyond = next((d for d in (loss, *gradients) if not d.relative <= tolerance), None)
    return Comparison(worst_loss, worst_gradient, first_beyond)


def _gradient_differences(step: int, reference: Path, other: Path) -> Iterator[Difference]:
    expected, actual = read_step(reference, step), read_step(other, step)
    if expected.keys() != actual.keys():
        names = sorted(expected.keys() ^ actual.keys())
        raise ValueError(f"step {step}: only one of the two runs has a gradient for {', '.join(names)}")
    whole = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in expected.values()))
    for name, tensor in expected.items():
        distance = float((tensor.double() - actual[name].double()).norm())
        yield Difference(step, name, _relative(distance, max(float(tensor.double().norm()), FLOOR * whole)))


def read_step(folder: Path, step: int) -> dict[str, Tensor]:
    """The whole gradient of each tensor at a step, assembled from the boxes that the ranks wrote, in the order of rank
    0's forward pass. Raises ValueError where boxes are missing."""
    whole: dict[str, Tensor] = {}
    for path in sorted((folder / f"step-{step}").glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            boxes: dict[str, Any] = json.loads(file.metadata()["boxes"])
            for name, box in boxes.items():
                if name not in whole:
                    whole[name] = torch.full(box["global_shape"], math.nan)
                part = file.get_tensor(name)
                place = tuple(slice(s, s + n) for s, n in zip(box["start"], part.shape, strict=True))
                whole[name][place] = part
    holes = [name for name, tensor in whole.items() if tensor.isnan().any()]
    if holes:
        raise ValueError(f"step {step}: gradients with missing boxes or NaN: {', '.join(holes)}")
    return whole


def _relative(distance: float, size: float) -> float:
    if size:
        return distance / size
    return 0.0 if distance == 0.0 else math.inf


def _order(difference: Difference) -> float:
    return difference.relative if not math.isnan(difference.relative) else math.inf
