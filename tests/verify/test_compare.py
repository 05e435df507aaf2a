"""The comparison itself, on recordings made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from meshwright.verify.compare import compare, read_step


def write(
    folder: Path, step: int, rank: int, tensors: Mapping[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]
) -> None:
    place = folder / f"step-{step}"
    place.mkdir(parents=True, exist_ok=True)
    boxes = {name: {"start": start, "global_shape": shape} for name, (_, start, shape) in tensors.items()}
    parts = {name: part.contiguous() for name, (part, _, _) in tensors.items()}
    save_file(parts, place / f"rank-{rank}.safetensors", metadata={"boxes": json.dumps(boxes)})


def whole(folder: Path, step: int, **tensors: Tensor) -> None:
    write(folder, step, 0, {name: (t, (0,) * t.dim(), tuple(t.shape)) for name, t in tensors.items()})


def test_boxes_of_all_ranks_become_whole_tensors(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(4, 3)
    write(tmp_path, 1, 0, {"a": (table[:3], (0, 0), (4, 3)), "s": (torch.tensor(2.0), (), ())})
    write(tmp_path, 1, 1, {"a": (table[3:], (3, 0), (4, 3))})
    read = read_step(tmp_path, 1)
    assert torch.equal(read["a"], table) and read["s"] == 2.0


def test_a_hole_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, {"a": (torch.ones(3, 3), (0, 0), (4, 3))})
    with pytest.raises(ValueError, match=r"missing boxes.*a"):
        read_step(tmp_path, 1)


def test_the_first_tensor_beyond_the_tolerance_is_named(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for step in (1, 2):
        whole(one, step, a=torch.ones(4), b=torch.ones(4))
    whole(other, 1, a=torch.ones(4), b=torch.ones(4) * (1 + 1e-7))
    whole(other, 2, a=torch.ones(4), b=torch.ones(4) * 1.5)
    found = compare(one, other, [(1.0, 1.0), (1.0, 1.0)], 1e-5)
    assert found.first_beyond is not None and (found.first_beyond.step, found.first_beyond.tensor) == (2, "b")
    assert found.gradient.relative == pytest.approx(0.5)
    assert compare(one, other, [(1.0, 1.0)], 1e-5).first_beyond is None
    first = compare(one, other, [(2.0, 2.1), (1.0, 1.0)], 1e-5).first_beyond
    assert first is not None and (first.step, first.tensor) == (1, "loss")


def test_a_small_tensor_is_judged_against_the_whole(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    whole(one, 1, big=torch.ones(100), noise=torch.full((4,), 1e-9))
    whole(other, 1, big=torch.ones(100), noise=torch.full((4,), -1e-9))
    assert compare(one, other, [(1.0, 1.0)], 1e-5).first_beyond is None
    whole(other, 1, big=torch.ones(100), noise=torch.full((4,), 1e-2))
    first_beyond = compare(one, other, [(1.0, 1.0)], 1e-5).first_beyond
    assert first_beyond is not None and first_beyond.tensor == "noise"


def test_not_a_number_parts_and_missing_tensors_are_an_error(tmp_path: Path) -> None:
    one, other, third = tmp_path / "one", tmp_path / "other", tmp_path / "third"
    whole(one, 1, a=torch.ones(2))
    whole(other, 1, a=torch.ones(2))
    assert compare(one, other, [(1.0, float("nan"))], 1e-5).first_beyond is not None
    whole(third, 1, a=torch.ones(2), b=torch.ones(2))
    with pytest.raises(ValueError, match=r"only one of the two.*b"):
        compare(one, third, [(1.0, 1.0)], 1e-5)
