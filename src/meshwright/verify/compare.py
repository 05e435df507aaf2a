"""Compares two recorded runs, step by step and tensor by tensor."""

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

#: A tensor whose gradient is smaller than this share of the whole is judged against that share, not against itself:
#: AdamW turns rounding into steps of full size where a gradient is near zero, and what is
#: zero in exact arithmetic (the bias of keys, under softmax) is rounding noise on every layout. A fault is far larger.
FLOOR = 0.1


@dataclass(frozen=True)
class Difference:
    """How far the layout is from one device at one step: |layout - device| / |device| of one tensor or the loss."""

    step: int
    tensor: str
    relative: float


@dataclass(frozen=True)
class Comparison:
    """The largest differences met, and the first beyond the tolerance (None: equal)."""

    loss: Difference
    gradient: Difference
    first_beyond: Difference | None


def compare(reference: Path, other: Path, losses: list[tuple[float, float]], tolerance: float) -> Comparison:
    """Compares the gradients recorded under both folders, and `losses` as (reference, other) by step from 1.

    Of a step, the loss is looked at first, then tensors in the order of the forward pass. Raises ValueError where the
    two recorded different tensors.
    """
    worst_loss = Difference(0, "loss", 0.0)
    worst_gradient = Difference(0, "", 0.0)
    first_beyond: Difference | None = None
    for step, (expected, found) in enumerate(losses, start=1):
        loss = Difference(step, "loss", _relative(abs(expected - found), abs(expected)))
        worst_loss = max(worst_loss, loss, key=_order)
        gradients = list(_gradient_differences(step, reference, other))
        worst_gradient = max([worst_gradient, *gradients], key=_order)
        if first_beyond is None:
            first_beyond = next((d for d in (loss, *gradients) if not d.relative <= tolerance), None)
    return Comparison(worst_loss, worst_gradient, first_beyond)


def _gradient_differences(step: int, reference: Path, other: Path) -> Iterator[Difference]:
    expected, found = read_step(reference, step), read_step(other, step)
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        raise ValueError(f"step {step}: only one of the two has a gradient for {', '.join(odd)}")
    whole = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in expected.values()))
    for name, tensor in expected.items():
        distance = float((tensor.double() - found[name].double()).norm())
        yield Difference(step, name, _relative(distance, max(float(tensor.double().norm()), FLOOR * whole)))


def read_step(folder: Path, step: int) -> dict[str, Tensor]:
    """The whole gradient of a step, put together from the boxes that the ranks wrote, in order of name of rank 0's
    forward pass. Raises ValueError where boxes leave a hole."""
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
        raise ValueError(f"step {step}: gradients with a hole or not a number: {', '.join(holes)}")
    return whole


def _relative(distance: float, size: float) -> float:
    if size:
        return distance / size
    return 0.0 if distance == 0.0 else math.inf


def _order(difference: Difference) -> float:
    return difference.relative if not math.isnan(difference.relative) else math.inf
