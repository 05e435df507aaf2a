"""The comparison itself, on recordings made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from meshwright.verify.compare import Comparison, Recording, compare, read_step


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


def test_buffers_are_compared_by_value_and_counts_exactly(runs: Callable[..., Comparison], tmp_path: Path) -> None:
    def judged(**changed: Tensor) -> Comparison:
        plain = {"mean": torch.tensor([3.0, 4.0]), "count": torch.tensor(7), "mask": torch.tensor([0.0, -math.inf])}
        for name in ("reference", "followed"):
            buffers = plain | changed if name == "followed" else plain
            (tmp_path / name / "step-1").mkdir(parents=True, exist_ok=True)
            save_file(buffers, tmp_path / name / "step-1" / "buffers-0.safetensors")
        return runs(reference=[{"w": torch.ones(3)}])

    assert judged().first_beyond is None and judged().buffer.relative == 0.0
    nearly = judged(mean=torch.tensor([3.0, 4.0002]))
    assert nearly.first_beyond is None and nearly.buffer.relative == pytest.approx(4e-5, rel=1e-2)
    for name, value in (("mean", torch.tensor([3.0, 4.01])), ("count", torch.tensor(8)), ("mask", torch.zeros(2))):
        found = judged(**{name: value}).first_beyond
        assert found is not None and (found.step, found.tensor) == (1, f"buffer {name}")


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., Comparison]:
    """Compares a layout with one device: `steps` has, for each of the four runs, a dict of tensors for each step."""

    def judge(
        losses: Mapping[str, Sequence[float]] | None = None, **steps: Sequence[Mapping[str, Tensor]]
    ) -> Comparison:
        recordings = []
        for name in ("reference", "reordered", "free", "followed"):
            run = steps.get(name, steps["reference"])
            for step, tensors in enumerate(run, start=1):
                whole(tmp_path / name, step, **tensors)
            recordings.append(Recording((losses or {}).get(name, [1.0] * len(run)), tmp_path / name))
        return compare(*recordings, 1e-5)

    return judge


ONES = {"a": torch.ones(4), "b": torch.ones(4)}


def moved(by: float) -> dict[str, Tensor]:
    return {"a": torch.ones(4), "b": torch.ones(4) * (1 + by)}


def first(comparison: Comparison) -> tuple[int, str] | None:
    beyond = comparison.first_beyond
    return None if beyond is None else (beyond.step, beyond.tensor)


def test_the_first_tensor_beyond_the_tolerance_is_named(runs: Callable[..., Comparison]) -> None:
    equal = [ONES, ONES]
    found = runs(reference=equal, followed=[moved(1e-7), moved(0.5)])
    assert first(found) == (2, "b") and found.gradient.relative == pytest.approx(0.5)
    assert first(runs(reference=equal)) is None
    assert first(runs({"followed": [1.1, 1.0]}, reference=equal)) == (1, "loss")
    assert first(runs({"free": [1.0, 1.1]}, reference=equal)) == (2, "loss")
    assert first(runs({"followed": [1.0, math.nan]}, reference=equal)) == (2, "loss")


def test_rounding_that_grows_as_on_one_device_is_equal(runs: Callable[..., Comparison]) -> None:
    equal = [ONES, ONES, ONES]
    grown = runs(reference=equal, reordered=[ONES, moved(1e-6), moved(2e-5)], free=[ONES, moved(8e-6), moved(6e-5)])
    assert first(grown) is None
    assert grown.drift.relative == pytest.approx(6e-5, rel=0.1)
    assert first(runs(reference=equal, reordered=[ONES, ONES, moved(2e-5)], free=[ONES, moved(6e-5), ONES])) == (2, "b")
    assert first(runs(reference=equal, reordered=[ONES, ONES, moved(2e-5)], free=[ONES, ONES, moved(1e-3)])) == (3, "b")


def test_a_fault_is_caught_from_equal_weights_whatever_the_rounding(runs: Callable[..., Comparison]) -> None:
    equal, noisy = [ONES, ONES], [ONES, moved(0.5)]
    assert first(runs(reference=equal, reordered=noisy, free=noisy)) is None
    assert first(runs(reference=equal, reordered=noisy, free=noisy, followed=[ONES, moved(1e-3)])) == (2, "b")


def test_a_small_tensor_is_judged_by_its_own_size_at_step_1(runs: Callable[..., Comparison]) -> None:
    def small(size: float, step_2: float = 1e-6) -> list[dict[str, Tensor]]:
        return [{"big": torch.ones(100), "small": torch.full((4,), each)} for each in (size, step_2)]

    reordered = small(1e-6 * (1 + 1e-6))
    assert first(runs(reference=small(1e-6), reordered=reordered, followed=small(1e-6 * (1 + 1e-3)))) == (1, "small")
    assert first(runs(reference=small(1e-6), reordered=reordered, followed=small(1e-6, 1.1e-6))) is None
    assert first(runs(reference=small(1e-6), reordered=reordered, followed=small(1e-6, 1e-2))) == (2, "small")


def test_a_tensor_that_is_nothing_but_rounding_is_equal(runs: Callable[..., Comparison]) -> None:
    def noise(size: float) -> list[dict[str, Tensor]]:
        return [{"big": torch.ones(100), "noise": torch.full((4,), size)}]

    assert first(runs(reference=noise(1e-9), reordered=noise(-2e-9), free=noise(-1e-9), followed=noise(-1e-9))) is None
    assert first(runs(reference=noise(1e-9), followed=noise(-1e-9))) is None, "one sample has no other order"


def test_a_tensor_that_only_one_run_has_is_an_error(runs: Callable[..., Comparison]) -> None:
    with pytest.raises(ValueError, match=r"only one of the two.*b"):
        runs(reference=[{"a": torch.ones(4)}], followed=[ONES])
