"""The pipeline's order of work against the textbook, and stages against every possible cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan.schedule import Action, actions, balance_costs, in_flight, replay, span_seconds

counts = st.integers(1, 6)
schedules = st.sampled_from(["gpipe", "1f1b"])
seconds = st.floats(0.1, 10.0)


@given(schedules, counts, counts)
def test_every_stage_does_every_micro_batch_forward_then_backward(schedule: str, stages: int, micro: int) -> None:
    for order in actions(schedule, stages, micro):
        assert sorted((a.kind, a.micro_batch) for a in order) == [(k, i) for k in "BF" for i in range(micro)]
        for i in range(micro):
            assert order.index(Action("F", i)) < order.index(Action("B", i))


@given(schedules, counts, counts)
def test_in_flight_is_what_the_action_lists_hold(schedule: str, stages: int, micro: int) -> None:
    for stage, order in enumerate(actions(schedule, stages, micro)):
        held = most = 0
        for action in order:
            held += 1 if action.kind == "F" else -1
            most = max(most, held)
        assert most == in_flight(schedule, stages, stage, micro)


@given(schedules, counts, counts)
def test_bubble_of_equal_stages_is_the_textbook_one(schedule: str, stages: int, micro: int) -> None:
    timeline = replay(actions(schedule, stages, micro), [1.0] * stages, [2.0] * stages)
    assert timeline.seconds == pytest.approx(3.0 * (micro + stages - 1))
    assert timeline.bubble == pytest.approx((stages - 1) / (micro + stages - 1))


@given(schedules, counts, st.lists(st.tuples(seconds, seconds), min_size=1, max_size=5), st.floats(0, 1))
def test_replay_keeps_order_and_dependencies(
    schedule: str, micro: int, stage_seconds: list[tuple[float, float]], transfer: float
) -> None:
    stages = len(stage_seconds)
    forward, backward = [f for f, _ in stage_seconds], [b for _, b in stage_seconds]
    timeline = replay(actions(schedule, stages, micro), forward, backward, transfer)
    stop = {(e.kind, e.stage, e.micro_batch): e.stop_seconds for e in timeline.events}
    for stage in range(stages):
        mine = [e for e in timeline.events if e.stage == stage]
        assert all(a.stop_seconds <= b.start_seconds + 1e-9 for a, b in pairwise(mine))
    for event in timeline.events:
        before = event.stage + (-1 if event.kind == "F" else 1)
        arrived = stop.get((event.kind, before, event.micro_batch))
        if arrived is not None:
            assert event.start_seconds >= arrived + transfer - 1e-9
    slowest = max(f + b for f, b in stage_seconds)
    assert timeline.seconds >= micro * slowest - 1e-9
    assert 0 <= timeline.bubble < 1


@given(schedules, counts, counts, seconds, seconds)
def test_the_formula_equals_the_replay_where_stages_are_equal(
    schedule: str, stages: int, micro: int, forward: float, backward: float
) -> None:
    times = [forward] * stages, [backward] * stages
    replayed = replay(actions(schedule, stages, micro), *times).seconds
    assert span_seconds(schedule, micro, *times) == pytest.approx(replayed)


def test_lists_that_wait_for_each_other_are_found() -> None:
    with pytest.raises(ValueError, match="for ever"):
        replay([[Action("B", 0), Action("F", 0)]], [1.0], [1.0])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="zigzag"):
        actions("zigzag", 2, 2)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_of_all_cuts(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cut = balance_costs(costs, stages)

    def worst(firsts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in zip(firsts, (*firsts[1:], len(costs)), strict=True))

    assert cut[0] == 0 and len(cut) == stages and list(cut) == sorted(set(cut))
    best = min(worst((0, *rest)) for rest in combinations(range(1, len(costs)), stages - 1))
    assert worst(cut) == pytest.approx(best, rel=1e-9)


def test_more_stages_than_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks cannot make 3 stages"):
        balance_costs([1.0, 1.0], 3)
