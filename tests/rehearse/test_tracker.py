"""The tracker against what the allocator says, and against tensors whose lives are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from meshwright.launch import Context
from meshwright.layout import Layout
from meshwright.rehearse import CATEGORIES
from meshwright.rehearse.tracker import Tracker
from tests.rehearse.cases import Case, measure_here

RNG_STATE_BYTES = 5056  # a checkpointed block keeps the state of the generator, which no operation makes


@pytest.mark.parametrize(("recompute", "states"), [("none", 0), pytest.param("full", 4, marks=pytest.mark.slow)])
def test_it_finds_what_the_allocator_gave_out(recompute: str, states: int, tmp_path: Path) -> None:
    """Two real runs: one followed by the tracker, one without it, of which torch's profiler saw every allocation."""
    from meshwright.rehearse.stage import allocated_bytes
    from meshwright.rehearse.work import tracked_run

    case = Case(Layout(micro_batch=4, recompute=recompute))
    (tracked,) = measure_here(case, tmp_path)
    by_allocator = allocated_bytes(tracked_run(case.payload(tmp_path)), Context.alone())
    assert 0 <= by_allocator - tracked.total <= 64 + states * RNG_STATE_BYTES


def test_a_storage_counts_once_from_birth_to_death() -> None:
    with Tracker() as tracker:
        a = torch.zeros(256)
        views = [a[:10], a.view(16, 16), a.detach()]
        assert tracker._current == 1024
        b = a + 1
        del a
        assert tracker._current == 2048
        views.clear()
        assert tracker._current == 1024
        b.untyped_storage().resize_(0)
        assert tracker._current == 0
        b.untyped_storage().resize_(512)
    assert (tracker._current, tracker.peak().total) == (512, 2048)


def test_sizes_are_rounded_as_the_allocator_rounds() -> None:
    with Tracker(rounding=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(129)]
    assert tracker._current == 512 + 1024 and kept


def test_what_lives_on_is_told_from_what_does_not() -> None:
    """What a forward leaves for its backward is an activation, what it drops is temporary, what a backward leaves is a
    gradient; a marked tensor is what it is said to be."""
    with Tracker() as tracker:
        weight = torch.zeros(100, requires_grad=True)
        tracker.mark("weights", [weight])
        tracker.enter("forward", "0")
        loss = (weight + 1).exp().sum()  # exp keeps its result
        dropped = torch.zeros(1000)
        del dropped
        loss.backward()
        del loss
        tracker.enter("optimizer")
    peak = tracker.peak()
    assert (peak.total, peak.moment) == (4 * (100 + 100 + 1 + 1000), "forward of 0")
    assert [peak.parts[name] for name in CATEGORIES] == [400, 0, 0, 404, 4000]
    backward = tracker.peaks()["backward", "0"]
    assert backward.parts["weights"] == backward.parts["gradients"] == 400
    assert tracker._current == 800


def test_forgetting_keeps_what_is_held() -> None:
    with Tracker() as tracker:
        held = torch.zeros(10)
        large: Tensor | None = torch.zeros(1000)
        del large
        tracker.forget()
        held = torch.cat([held, held])
    assert tracker.peak().total == 40 + 80


def test_values_are_made_up_only_when_asked() -> None:
    with Tracker(fake=True):
        assert torch.zeros(3).sum().item() == 1.0 and int(torch.zeros(3, dtype=torch.int64).sum()) == 1
    with Tracker():
        assert torch.zeros(3).sum().item() == 0.0
