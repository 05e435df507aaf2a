"""The schedules against torch's own, the papers' bubbles, and the fast figures against the replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.layout import SCHEDULES
from meshwright.plan.pipeline import TABLE, balance_costs, length, peak_activation_bytes, span_seconds
from meshwright.plan.pipeline.actions import Action, actions, micro_batches_to_draw, schedule_problem, stage_ranks
from meshwright.plan.pipeline.in_flight import in_flight
from meshwright.plan.pipeline.replay import Timeline, replay

seconds = st.floats(0.1, 10.0)


@st.composite
def runs(draw: st.DrawFn, most_stages: int = 6, most_rounds: int = 5) -> tuple[str, int, int, int]:
    """(schedule, stages, micro-batches, vpp) that can run."""
    schedule = draw(st.sampled_from(SCHEDULES))
    row = TABLE[schedule]
    stages, vpp = draw(st.integers(1, most_stages)), draw(st.integers(row.least_vpp, min(row.most_vpp, 4)))
    micro = draw(st.one_of(st.integers(1, most_rounds).map(lambda n: n * stages), st.integers(1, 5 * stages)))
    assume(schedule_problem(schedule, stages, micro, vpp) is None)
    return schedule, stages, micro, vpp


@st.composite
def timed_runs(draw: st.DrawFn, most_rounds: int = 5, uneven: float = 10.0, slowest_transfer: float = 2.0):  # type: ignore[no-untyped-def]
    """A run with its seconds: forwards from 1 to `uneven`, backwards twice as long."""
    schedule, stages, micro, vpp = draw(runs(most_rounds=most_rounds))
    count = stages * vpp
    times = st.lists(st.floats(1.0, uneven), min_size=count, max_size=count)
    forward, backward = draw(times), [2 * b for b in draw(times)]
    weight = [b * draw(st.floats(0.1, 0.6)) for b in backward]
    return schedule, stages, micro, vpp, forward, backward, weight, draw(st.floats(0.0, slowest_transfer))


def test_the_table_is_the_layouts() -> None:
    assert tuple(TABLE) == SCHEDULES


@given(runs())
def test_every_virtual_stage_does_every_micro_batch_once_in_order(run: tuple[str, int, int, int]) -> None:
    schedule, stages, micro, vpp = run
    ranks = stage_ranks(schedule, stages, vpp)
    assert Counter(ranks) == Counter(dict.fromkeys(range(stages), vpp))
    seen: Counter[tuple[str, int, int]] = Counter()
    for rank, order in enumerate(actions(*run)):
        place = {action: index for index, action in enumerate(order)}
        assert len(place) == len(order) and all(ranks[action.stage] == rank for action in order)
        for kind, i, stage in order:
            seen["F" if kind == "F" else "W" if kind == "W" else "B", i, stage] += 1
            if kind in "BI":
                assert place[Action("F", i, stage)] < place[Action(kind, i, stage)]
            if kind == "I":
                assert place[Action("I", i, stage)] < place[Action("W", i, stage)]
    passes = [(i, stage) for i in range(micro) for stage in range(stages * vpp)]
    assert all(seen["F", *one] == seen["B", *one] == 1 for one in passes)
    assert set(seen) <= {(kind, *one) for kind in "FBW" for one in passes}


@given(timed_runs())
def test_no_schedule_waits_for_ever_and_each_keeps_its_order(run) -> None:  # type: ignore[no-untyped-def]
    schedule, stages, micro, vpp, forward, backward, weight, transfer = run
    timeline = replay(actions(schedule, stages, micro, vpp), forward, backward, transfer, weight_seconds=weight)
    ranks = stage_ranks(schedule, stages, vpp)
    for row in timeline.rows():
        assert all(a.stop_seconds <= b.start_seconds + 1e-9 for a, b in pairwise(row))
    stop = {("B" if e.kind == "I" else e.kind, e.stage, e.micro_batch): e.stop_seconds for e in timeline.events}
    for event in timeline.events:
        if event.kind == "W":
            continue
        kind = "F" if event.kind == "F" else "B"
        before = event.stage + (-1 if kind == "F" else 1)
        if (arrived := stop.get((kind, before, event.micro_batch))) is not None:
            far = ranks[before] != event.rank
            assert event.start_seconds >= arrived + (transfer if far else 0.0) - 1e-9
    assert sum(timeline.busy_seconds) == pytest.approx(micro * (sum(forward) + sum(backward)))
    assert timeline.seconds >= max(timeline.busy_seconds) - 1e-6
    assert -1e-9 <= timeline.bubble < 1


def torch_order(name: str, stages: int, micro: int, vpp: int) -> list[list[Action]]:
    """The order of torch's schedule of that class, without its idle slots and communication."""
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules")
    stage_module = pytest.importorskip("torch.distributed.pipelining.stage")

    class Stage(stage_module._PipelineStageBase):  # type: ignore[misc, name-defined]
        def __init__(self, index: int) -> None:
            self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages * vpp, stages, 0
            self.group = self.submod = None
            self.has_backward = True

        def _create_grad_recv_info(self, *args: object) -> None: ...

        def _prepare_forward_infra(self, *args: object) -> None: ...

        def _prepare_backward_infra(self, *args: object) -> None: ...

    if name in ("ScheduleGPipe", "Schedule1F1B"):
        order = getattr(pipelining, name)(Stage(0), micro)._get_pipeline_order()
    else:
        order = getattr(pipelining, name)([Stage(chunk) for chunk in range(vpp)], micro).pipeline_order
    result = []
    for rank in range(stages):
        row = []
        for action in order[rank]:
            for part in (action.sub_actions or (action,)) if action is not None else ():
                if part.computation_type.value in "FBIW":
                    row.append(Action(part.computation_type.value, part.microbatch_index, part.stage_index))
        # torch 2.13 draws 1F1B's last rank with forwards numbered from 1; what it runs, it numbers from 0
        first = min(action.micro_batch for action in row if action.kind == "F")
        result.append([a._replace(micro_batch=a.micro_batch - first) if a.kind == "F" else a for a in row])
    return result


TORCH = {
    "gpipe": ("ScheduleGPipe", [(2, 3, 1), (4, 6, 1)]),
    "1f1b": ("Schedule1F1B", [(2, 2, 1), (4, 4, 1), (4, 9, 1), (8, 16, 1)]),
    "interleaved": ("ScheduleInterleaved1F1B", [(2, 4, 2), (4, 8, 2), (4, 8, 4), (4, 10, 2), (4, 3, 2), (8, 32, 3)]),
    "zb-h1": ("ScheduleInterleavedZeroBubble", [(2, 4, 1), (4, 8, 1), (8, 24, 1), (4, 8, 2), (4, 12, 3)]),
    "zbv": ("ScheduleZBVZeroBubble", [(2, 2, 2), (2, 8, 2), (4, 3, 2), (4, 8, 2), (8, 24, 2)]),
    "dualpipev": ("ScheduleDualPipeV", [(1, 2, 2), (2, 4, 2), (4, 8, 2), (4, 11, 2), (8, 20, 2), (5, 10, 2)]),
}


@pytest.mark.parametrize("schedule", TORCH)
def test_the_order_is_torchs_own(schedule: str) -> None:
    name, cases = TORCH[schedule]
    for stages, micro, vpp in cases:
        mine = [list(order) for order in actions(schedule, stages, micro, vpp)]
        assert mine == torch_order(name, stages, micro, vpp), (stages, micro, vpp)


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 12))
def test_bubble_of_equal_stages_is_the_textbook_one(schedule: str, stages: int, micro: int) -> None:
    """(p - 1) / (m + p - 1): Huang et al. 2019; Narayanan et al. 2021."""
    timeline = replay(actions(schedule, stages, micro), [1.0] * stages, [2.0] * stages)
    assert timeline.seconds == pytest.approx(3.0 * (micro + stages - 1))
    assert timeline.bubble == pytest.approx((stages - 1) / (micro + stages - 1))


@given(st.integers(1, 6), st.integers(2, 4), st.integers(1, 4))
def test_interleaving_divides_the_bubble_by_the_virtual_stages(stages: int, vpp: int, rounds: int) -> None:
    """(p - 1) (F + B) / v idle: Narayanan et al. 2021, section 2.2."""
    count, micro = stages * vpp, rounds * stages
    timeline = replay(actions("interleaved", stages, micro, vpp), [1.0] * count, [2.0] * count)
    assert timeline.seconds - 3.0 * vpp * micro == pytest.approx((stages - 1) * 3.0)


@given(st.integers(2, 7), st.integers(2, 4))
def test_zero_bubble_schedules_idle_as_their_paper_says(stages: int, rounds: int) -> None:
    """Qi et al. 2024, table 1, F = I = W: H1 a third of 1F1B's bubble, H2 and V none but for a barrier."""
    micro = rounds * stages

    def longest_rank(timeline: Timeline) -> float:
        """The longest time from a rank's first start to its last stop: the step's where no barrier ends it."""
        return max(max(event.stop_seconds for event in row) - row[0].start_seconds for row in timeline.rows())

    def timeline(schedule: str, vpp: int) -> Timeline:
        n = stages * vpp
        return replay(actions(schedule, stages, micro, vpp), [1.0] * n, [2.0] * n, weight_seconds=[1.0] * n)

    assert timeline("zb-h1", 1).seconds == pytest.approx(3.0 * micro + stages - 1)
    assert longest_rank(timeline("zb-h2", 1)) == pytest.approx(3.0 * micro)
    assert longest_rank(timeline("zbv", 2)) == pytest.approx(6.0 * micro)
    assert timeline("dualpipev", 2).seconds == pytest.approx(6.0 * micro + stages - 1)


@given(st.integers(2, 7), st.integers(2, 5))
def test_memory_of_zero_bubble_schedules_is_their_papers(stages: int, rounds: int) -> None:
    """In activations of a whole stage: H1 as 1F1B's first stage, H2 twice less one (Qi et al. 2024, table 1), V as
    1F1B's in halves, DualPipe one more (DeepSeek-V3, table 2)."""
    micro = rounds * stages
    for rank in range(stages):
        assert in_flight("1f1b", stages, rank, micro) == stages - rank
        assert in_flight("zb-h1", stages, rank, micro) == stages
        assert in_flight("zb-h2", stages, rank, micro) == min(2 * stages - 1, micro)
        assert in_flight("zbv", stages, rank, micro, 2) == min(2 * stages, 2 * micro)
        assert in_flight("dualpipev", stages, rank, micro, 2) == 2 * stages + 1
        assert in_flight("interleaved", stages, rank, micro, 2) == min(3 * stages - 2 * rank - 1, 2 * micro)


@given(runs(), st.integers(0, 10**6))
def test_peak_activations_are_the_most_of_all_moments(run: tuple[str, int, int, int], seed: int) -> None:
    schedule, stages, micro, vpp = run
    kept = [1.0 + (seed * (i + 3)) % 7 for i in range(stages * vpp)]
    pending = [1.0 + (seed * (i + 5)) % 5 for i in range(stages * vpp)]
    expected = []
    for order in actions(schedule, stages, micro, vpp):
        now = most = 0.0
        for kind, _, stage in order:
            if kind == "F":
                now += kept[stage]
            elif kind == "I":
                now += pending[stage] - kept[stage]
            else:
                now -= kept[stage] if kind == "B" else pending[stage]
            most = max(most, now)
        expected.append(most)
    assert peak_activation_bytes(schedule, stages, micro, kept, pending, vpp=vpp) == pytest.approx(expected)


@given(timed_runs())
def test_the_fast_length_is_the_replays_where_it_is_short(run) -> None:  # type: ignore[no-untyped-def]
    schedule, stages, micro, vpp, forward, backward, weight, transfer = run
    orders = actions(schedule, stages, micro, vpp)
    for overlapped in (True, False):
        how = {"weight_seconds": weight, "overlapped": overlapped}
        replayed = replay(orders, forward, backward, transfer, **how).seconds
        fast = span_seconds(schedule, micro, forward, backward, transfer, vpp=vpp, **how)
        # two micro-batches a rank are always replayed whole; gpipe is a formula
        exact = schedule == "gpipe" or micro <= 3 * stages
        assert fast == pytest.approx(replayed, rel=1e-9 if exact else 0.01)


@settings(max_examples=40)
@given(timed_runs(most_rounds=12, uneven=1.5, slowest_transfer=0.3), st.integers(5, 12))
def test_the_fast_length_of_many_micro_batches_is_near_the_replays(run, rounds: int) -> None:  # type: ignore[no-untyped-def]
    schedule, stages, _, vpp, forward, backward, weight, transfer = run
    micro = rounds * stages
    orders = actions(schedule, stages, micro, vpp)
    replayed = replay(orders, forward, backward, transfer, weight_seconds=weight).seconds
    fast = span_seconds(schedule, micro, forward, backward, transfer, vpp=vpp, weight_seconds=weight)
    assert fast == pytest.approx(replayed, rel=0.01)


def test_thousands_of_micro_batches_cost_what_tens_do() -> None:
    length._program.cache_clear()
    seconds_each: Sequence[float] = [1.0] * 8
    span_seconds("interleaved", 8192, seconds_each, seconds_each, 0.1, vpp=2)
    longest = max(len(length._program(s, p, m, v).columns[0]) for s, p, m, v in [("interleaved", 4, 24, 2)])
    assert length._program.cache_info().currsize <= 3 and longest == 2 * 4 * 2 * 24


def test_a_transfer_counts_between_ranks_alone_and_may_differ_by_boundary() -> None:
    orders = actions("zbv", 2, 1, 2)  # the fold is between virtual stages 1 and 2, both on rank 1
    ones, half = [1.0] * 4, [0.5] * 4
    assert (
        replay(orders, ones, ones, [0.0, 5.0, 0.0], weight_seconds=half).seconds
        == replay(orders, ones, ones, 0.0, weight_seconds=half).seconds
    )
    slow = replay(orders, ones, ones, [3.0, 0.0, 0.0], weight_seconds=half).seconds
    assert slow == replay(orders, ones, ones, 0.0, weight_seconds=half).seconds + 6.0
    with pytest.raises(ValueError, match="2 transfers for 3 boundaries"):
        replay(orders, ones, ones, [1.0, 1.0], weight_seconds=half)


def test_a_blocking_transfer_takes_the_senders_time() -> None:
    """Two ranks, many micro-batches: an overlapped transfer costs little, a blocking one its whole time."""
    orders = actions("1f1b", 2, 8)
    beside = replay(orders, [2.0, 1.0], [2.0, 1.0], 0.5).seconds
    instead = replay(orders, [2.0, 1.0], [2.0, 1.0], 0.5, overlapped=False).seconds
    assert beside < instead == pytest.approx(replay(orders, [2.5, 1.0], [2.0, 1.5], 0.0).seconds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_stage_is_no_pipeline_whatever_the_schedules_name(schedule: str) -> None:
    (order,) = actions(schedule, 1, 3)
    assert [action.kind for action in order] == ["F", "B"] * 3
    assert in_flight(schedule, 1, 0, 3) == 1 and peak_activation_bytes(schedule, 1, 3, [5.0]) == (5.0,)
    assert span_seconds(schedule, 3, [1.0], [2.0]) == pytest.approx(9.0)


def test_ranks_that_wait_for_each_other_are_an_error() -> None:
    with pytest.raises(ValueError, match="for ever"):
        replay([[Action("B", 0, 0), Action("F", 0, 0)]], [1.0], [1.0])


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (("zigzag", 2, 2, 1), "no schedule 'zigzag'"),
        (("1f1b", 2, 2, 2), "1 virtual stages per rank, not 2"),
        (("interleaved", 2, 2, 1), "2 or more virtual stages per rank, not 1"),
        (("interleaved", 4, 9, 2), r"whole rounds of micro-batches \(8\), not 9"),
        (("dualpipev", 4, 7, 2), "needs 8 micro-batches or more, not 7"),
        (("gpipe", 0, 1, 1), "needs a stage"),
    ],
)
def test_a_run_that_a_schedule_cannot_do_is_an_error(run: tuple[str, int, int, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        actions(*run)


def test_split_backwards_need_weight_seconds() -> None:
    with pytest.raises(ValueError, match="weight_seconds"):
        replay(actions("zb-h1", 2, 2), [1.0] * 2, [1.0] * 2)
    with pytest.raises(ValueError, match="a part of backward_seconds"):
        span_seconds("zb-h1", 2, [1.0] * 2, [1.0] * 2, weight_seconds=[2.0] * 2)


@given(runs(), st.integers(1, 12))
def test_a_picture_shows_few_micro_batches_that_can_run(run: tuple[str, int, int, int], most: int) -> None:
    schedule, stages, micro, vpp = run
    count = micro_batches_to_draw(schedule, stages, micro, most, vpp)
    assert 1 <= count <= micro and schedule_problem(schedule, stages, count, vpp) is None
    if count > most:
        assert all(schedule_problem(schedule, stages, n, vpp) for n in range(1, most + 1))


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
