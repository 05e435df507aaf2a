"""Compares the recorded gradients and buffers of two runs, step by step and tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

#: The difference of a gradient is relative to its norm, but at least to this share of the whole gradient's norm. AdamW
#: turns rounding into full-size steps where a gradient is near zero, and a gradient that is zero in exact arithmetic
#: (the bias of keys, under softmax) is rounding noise on every layout. A fault is far larger.
FLOOR = 0.1


#: How far two runs may part that begin alike and go on by themselves, as a multiple of how far one device parts from
#: itself when it sums in another order: a layout sums in several other orders.
NOISE_FACTOR = 10.0

#: Running means and variances are small differences of large sums, and their rounding is larger than a gradient's.
BUFFER_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Recording:
    """The losses of a run from step 1, and the folder of its gradients and buffers."""

    losses: Sequence[float]
    folder: Path


@dataclass(frozen=True)
class Difference:
    """|layout - device| / |device| at one step, and what is `allowed`: of the loss (`tensor` is "loss"), of a gradient
    (the parameter's name), or of a buffer ("buffer" and its name)."""

    step: int
    tensor: str
    relative: float
    allowed: float = 0.0

    @property
    def beyond(self) -> bool:
        return not self.relative <= self.allowed  # NaN is beyond everything


@dataclass(frozen=True)
class Comparison:
    """The largest differences: of `loss`, `gradient` and `buffer` where each step begins from equal weights, of `drift`
    where the runs go on by themselves. `first_beyond` is the first that is not allowed (None: equal)."""

    loss: Difference
    gradient: Difference
    buffer: Difference
    drift: Difference
    first_beyond: Difference | None


def compare(
    reference: Recording, reordered: Recording, free: Recording, followed: Recording, tolerance: float
) -> Comparison:
    """Compares a layout with one device, the `reference`.

    `followed` is the layout's run whose every step begins from the reference's weights: within `tolerance`, and at step
    1 each tensor by its own size. `free` is the layout's run by itself, in which rounding grows: within NOISE_FACTOR of
    what it grows to on one device, which `reordered` shows: the reference with its batches in another order.

    Within a step the loss comes first, then the tensors in order of the forward pass. Raises ValueError where two runs
    recorded different tensors.
    """
    worst_loss, worst_gradient, worst_buffer, drift = (Difference(0, word, 0.0) for word in ("loss", "", "", ""))
    first_beyond: Difference | None = None
    noise = 0.0
    for step in range(1, len(reference.losses) + 1):
        expected = read_step(reference.folder, step)
        other_order = read_step(reordered.folder, step)
        loss, *gradients = differences(step, expected, reference, followed, tolerance)
        moved = max(differences(step, expected, reference, reordered, 0.0), key=_order)
        noise = max(noise, moved.relative)
        drifted = differences(step, expected, reference, free, max(tolerance, NOISE_FACTOR * noise))
        by_size = _by_own_size(expected, read_step(followed.folder, 1), other_order, tolerance) if step == 1 else []
        worst_loss = max(worst_loss, loss, key=_order)
        worst_gradient = max([worst_gradient, *gradients], key=_order)
        buffers = _of_buffers(step, reference.folder, followed.folder, tolerance)
        worst_buffer = max([*buffers, worst_buffer], key=_order)
        drift = max([drift, *drifted], key=_order)
        if first_beyond is None:
            first_beyond = next((d for d in (loss, *gradients, *by_size, *buffers, *drifted) if d.beyond), None)
    return Comparison(worst_loss, worst_gradient, worst_buffer, drift, first_beyond)


def differences(
    step: int, expected: Mapping[str, Tensor], reference: Recording, other: Recording, allowed: float
) -> list[Difference]:
    """Of the loss, then of each tensor of `expected`, the gradients of `reference` at the step."""
    actual = read_step(other.folder, step)
    if expected.keys() != actual.keys():
        names = sorted(expected.keys() ^ actual.keys())
        raise ValueError(f"step {step}: only one of the two runs has a gradient for {', '.join(names)}")
    loss, other_loss = reference.losses[step - 1], other.losses[step - 1]
    differences = [Difference(step, "loss", _relative(abs(loss - other_loss), abs(loss)), allowed)]
    whole = math.sqrt(sum(_norm(tensor) ** 2 for tensor in expected.values()))
    for name, tensor in expected.items():
        size = max(_norm(tensor), FLOOR * whole)
        differences.append(Difference(step, name, _relative(_distance(tensor, actual[name]), size), allowed))
    return differences


def _by_own_size(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], reordered: Mapping[str, Tensor], tolerance: float
) -> list[Difference]:
    """Step 1, before anything is amplified: each tensor relative to itself, however small it is beside the others.

    Where another order of sums moves a tensor, that much is allowed too: a gradient that is zero in exact arithmetic is
    nothing but rounding. Tensors that it does not move are left out (a batch of one sample has no other order).
    """
    differences = []
    for name, tensor in expected.items():
        if noise := _relative(_distance(tensor, reordered[name]), _norm(tensor)):
            relative = _relative(_distance(tensor, actual[name]), _norm(tensor))
            differences.append(Difference(1, name, relative, max(tolerance, NOISE_FACTOR * noise)))
    return differences


def _of_buffers(step: int, expected: Path, actual: Path, tolerance: float) -> list[Difference]:
    """Of each persistent buffer, relative to its norm, within BUFFER_TOLERANCE or `tolerance`; counts must be equal."""
    whole, other = _read_buffers(expected, step), _read_buffers(actual, step)
    if whole.keys() != other.keys():
        raise ValueError(f"step {step}: only one of the two runs has {', '.join(sorted(whole.keys() ^ other.keys()))}")
    differences = []
    for name, buffer in whole.items():
        equal = torch.equal(buffer, other[name])  # infinities, as masks have them, have no difference
        relative = 0.0 if equal else _relative(_distance(buffer, other[name]), _norm(buffer))
        allowed = max(tolerance, BUFFER_TOLERANCE) if buffer.is_floating_point() else 0.0
        differences.append(Difference(step, f"buffer {name}", relative, allowed))
    return differences


def _read_buffers(folder: Path, step: int) -> dict[str, Tensor]:
    paths = sorted((folder / f"step-{step}").glob("buffers-*.safetensors"))
    return {name: buffer for path in paths for name, buffer in load_file(path).items()}


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _distance(tensor: Tensor, other: Tensor) -> float:
    return float((tensor.double() - other.double()).norm())


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
