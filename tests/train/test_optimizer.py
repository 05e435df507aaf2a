"""The learning rate at points computed by hand, and first values that do not depend on who holds them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.job.sections import TrainSection
from meshwright.layout import Box
from meshwright.placement import Placement
from meshwright.train import model
from meshwright.train.loop import Trainer
from meshwright.train.model import initial_values
from meshwright.train.optimizer import Optimizer, learning_rate


def train(**changes: Any) -> Any:
    said = {"steps": 100, "lr": 2.0, "warmup_steps": 10, "decay": "cosine", "min_lr_ratio": 0.1, "decay_fraction": 0.2}
    return SimpleNamespace(**{**said, **changes})


@pytest.mark.parametrize(
    ("step", "changes", "expected"),
    [
        (1, {}, 0.2),
        (5, {}, 1.0),
        (10, {}, 2.0),
        (55, {}, 0.2 + 1.8 / 2),  # half-way down
        (40, {}, 0.2 + 1.8 * 0.75),  # a third of the way: cos 60 degrees = 1/2
        (100, {}, 0.2),
        (1, {"warmup_steps": 0}, 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 100))),
        (100, {"min_lr_ratio": 0.0}, 0.0),
        (3, {"decay": "constant"}, 0.6),
        (10, {"decay": "constant"}, 2.0),
        (100, {"decay": "constant"}, 2.0),
        (10, {"decay": "wsd"}, 2.0),
        (80, {"decay": "wsd"}, 2.0),  # the last fifth decays
        (90, {"decay": "wsd"}, 0.2 + 1.8 / 2),
        (95, {"decay": "wsd"}, 0.2 + 1.8 / 4),
        (100, {"decay": "wsd"}, 0.2),
        (1, {"steps": 1, "warmup_steps": 0}, 0.2),
    ],
)
def test_learning_rate_at_points_computed_by_hand(step: int, changes: dict[str, Any], expected: float) -> None:
    assert learning_rate(step, train(**changes)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_wsd_of_no_decay_keeps_the_rate_until_its_last_step() -> None:
    rates = [learning_rate(step, train(decay="wsd", decay_fraction=0.0)) for step in range(10, 101)]
    assert set(rates[:-1]) == {2.0}
    assert rates[-1] == pytest.approx(0.2)


def rule(name: str) -> tuple[str, float]:
    return ("constant", 3.0) if name == "ones" else ("normal", 0.02)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(shape, start, tuple(draw(st.integers(1, n - s)) for s, n in zip(start, shape, strict=True)))


@settings(max_examples=60)
@given(box=boxes(), seed=st.integers(0, 5), at_once=st.integers(1, 300))
def test_first_values_do_not_depend_on_the_box(box: Box, seed: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_ELEMENTS_AT_ONCE", at_once)
        source = initial_values(seed, rule)
        whole, part = source("w", Box.whole(box.global_shape)), source("w", box)
        place = tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))
    assert part.shape == box.shape
    assert torch.equal(part, whole[place])


def test_first_values_differ_by_name_seed_and_run_and_have_the_spread_asked_for() -> None:
    whole = Box.whole((700, 800))  # more than one run of rows
    values = initial_values(0, rule)("w", whole)
    assert values.std() == pytest.approx(0.02, rel=0.01) and abs(float(values.mean())) < 1e-4
    rows_a_run = model._ELEMENTS_AT_ONCE // 800
    assert rows_a_run < 700 and not torch.equal(values[0], values[rows_a_run])
    assert not torch.equal(values, initial_values(0, rule)("other", whole))
    assert not torch.equal(values, initial_values(1, rule)("w", whole))
    assert torch.equal(initial_values(0, rule)("ones", Box.whole((5,))), torch.full((5,), 3.0))


def test_a_rank_without_an_element_of_anything_steps_with_the_others() -> None:
    """The last of eight shards of Linear(64, 10): ten rows, two a rank, are over after five ranks."""
    linear = torch.nn.Linear(64, 10)
    rows = {
        name: Placement(name, Box.whole(tuple(one.shape)).split(0, 8, 7), 1, False)
        for name, one in linear.named_parameters()
    }
    assert not any(row.box.elements for row in rows.values())
    part = SimpleNamespace(module=linear, placements=rows, local=lambda name: torch.empty(rows[name].box.shape))
    train = TrainSection(steps=2, lr=1e-3, global_batch=8)
    optimizer = Optimizer(part, train, torch.device("cpu"))  # type: ignore[arg-type]
    optimizer.collect()
    trainer = SimpleNamespace(job=SimpleNamespace(train=SimpleNamespace(clip=1.0)), optimizer=optimizer)
    Trainer._clip(trainer, norm=2.0, correction=0.5)  # type: ignore[arg-type]
    optimizer.step(1e-3)
    optimizer.clear()
    assert optimizer.state() == {} and optimizer.squared_norm().item() == 0.0
