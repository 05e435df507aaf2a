"""How long a schedule takes, quickly: a search asks a hundred thousand times. Tests compare it with `replay`."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

from meshwright.plan.pipeline.actions import TABLE, Action, actions, effective_schedule, schedule_problem, stage_ranks
from meshwright.plan.pipeline.replay import action_seconds, boundary_seconds, replay


def span_seconds(
    schedule: str,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    transfer_seconds: float | Sequence[float] = 0.0,
    *,
    vpp: int = 1,
    weight_seconds: Sequence[float] | None = None,
    overlapped: bool = True,
) -> float:
    """Length of the schedule; arguments as of `replay`, one entry per virtual stage.

    Equal to the replay's to the last digit up to LONGEST rounds of micro-batches, and within 1 % of it beyond: there
    the pipeline is taken to be full, and each further micro-batch to add what the last ones added, or the work of the
    busiest rank if that is more. Raises ValueError where the schedule cannot run that, or a backward is split and
    `weight_seconds` is None.
    """
    between = transfer_seconds if isinstance(transfer_seconds, (int, float)) else tuple(transfer_seconds)
    weight = None if weight_seconds is None else tuple(weight_seconds)
    return _span(
        schedule, micro_batches, vpp, tuple(forward_seconds), tuple(backward_seconds), weight, between, overlapped
    )


def least_span(
    schedule: str,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    transfer_seconds: float | Sequence[float] = 0.0,
    *,
    vpp: int = 1,
    weight_seconds: Sequence[float] | None = None,
    overlapped: bool = True,
) -> float:
    """A lower bound of `span_seconds`: the work of the busiest rank, and what comes before its first action and after
    its last. Arguments as of `span_seconds`."""
    timing = _StageTiming.of(
        schedule, vpp, forward_seconds, backward_seconds, weight_seconds, transfer_seconds, overlapped
    )
    return max(ends + micro_batches * each for each, ends in timing.busy)


#: (ranks up to, rounds, more rounds): both are replayed whole, and their difference is what a round adds. More ranks
#: fill more slowly, but their rounds are longer too.
LONGEST = ((4, 4, 6), (8, 3, 4), (1 << 30, 2, 3))
CACHED_SPANS = 1 << 16
LEAST_RANKS_OF_LEVELS = 8
#: With this many virtual stages per rank the last round alone shows what a round adds.
DEEP_VPP = 4


@lru_cache(maxsize=CACHED_SPANS)
def _span(
    schedule: str,
    micro_batches: int,
    vpp: int,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    weight: tuple[float, ...] | None,
    transfer: float | tuple[float, ...],
    overlapped: bool,
) -> float:
    stages = len(forward) // vpp
    if (wrong := schedule_problem(schedule, stages, micro_batches, vpp)) is not None:
        raise ValueError(wrong)
    timing = _StageTiming.of(schedule, vpp, forward, backward, weight, transfer, overlapped)
    schedule, seconds, between, busy = timing.schedule, timing.seconds, timing.between, timing.busy
    if schedule == "gpipe":
        rest = micro_batches - 1
        return sum(seconds["F"]) + sum(seconds["B"]) + rest * (max(seconds["F"]) + max(seconds["B"])) + 2 * sum(between)
    length = _lengths(schedule, stages, micro_batches, vpp, seconds, between)
    in_rounds = vpp > 1 and not TABLE[schedule].folded
    size = micro_batches // max(1, micro_batches // stages) if in_rounds else stages
    before, last = next((low, high) for ranks, low, high in LONGEST if stages <= ranks)
    while micro_batches > last * size:
        (longest, round_), rest = length(last * size), micro_batches - last * size
        deep = vpp >= DEEP_VPP and round_ > 0
        grows = round_ / size if deep else (longest - length(before * size)[0]) / ((last - before) * size)
        least = max(longest + rest * grows, *(ends + micro_batches * each for each, ends in busy))
        most = longest + rest * max(grows, *(each for each, _ in busy))
        if most <= 1.01 * least:
            return (most + least) / 2
        before, last = last, 2 * last
    return length(micro_batches)[0]


@dataclass(frozen=True)
class _StageTiming:
    """A schedule with seconds of each kind of action by virtual stage, and of the transfers `between` them; `ranks` is
    the rank of each virtual stage."""

    schedule: str
    seconds: Mapping[str, Sequence[float]]
    between: tuple[float, ...]
    ranks: tuple[int, ...]

    @staticmethod
    def of(
        schedule: str,
        vpp: int,
        forward: Sequence[float],
        backward: Sequence[float],
        weight: Sequence[float] | None,
        transfer: float | Sequence[float],
        overlapped: bool,
    ) -> _StageTiming:
        stages = len(forward) // vpp
        schedule = effective_schedule(schedule, stages, vpp)
        ranks = stage_ranks(schedule, stages, vpp)
        between = boundary_seconds(ranks, transfer)
        seconds = action_seconds(forward, backward, weight, TABLE[schedule].splits)
        if not overlapped:  # a transfer takes the sender's time, as if its work took longer
            ahead, back = (*between, 0.0), (0.0, *between)
            seconds = {
                kind: [own + sent for own, sent in zip(seconds[kind], more, strict=True)]
                for kind, more in zip("FBIW", (ahead, back, back, [0.0] * len(ahead)), strict=True)
            }
            between = (0.0,) * len(between)
        return _StageTiming(schedule, seconds, between, ranks)

    @cached_property
    def busy(self) -> list[tuple[float, float]]:
        """For each rank its work per micro-batch, and the seconds before its first action and, if backwards are whole,
        after its last (a split backward may end with weight gradients)."""
        splits, seconds = TABLE[self.schedule].splits, self.seconds
        stages = max(self.ranks) + 1
        each = [0.0] * stages
        for stage, rank in enumerate(self.ranks):
            each[rank] += seconds["F"][stage] + seconds["B"][stage]
        back = [0.0] * len(self.ranks) if splits else seconds["B"]
        ways = zip(seconds["F"], back, self.between, strict=False)
        ends = accumulate((f + b + (t if splits else 2 * t) for f, b, t in ways), initial=0.0)
        return list(zip(each, list(ends)[:stages], strict=True))


def _lengths(
    schedule: str,
    stages: int,
    micro_batches: int,
    vpp: int,
    seconds: Mapping[str, Sequence[float]],
    between: Sequence[float],
) -> Callable[[int], tuple[float, float]]:
    """A function from micro-batches to the exact length and what the last full round added (0: unknown)."""
    if schedule == "1f1b" and stages >= LEAST_RANKS_OF_LEVELS and micro_batches >= stages:
        levels = _Levels(seconds["F"], seconds["B"], between)
        return lambda count: (levels.seconds(count), 0.0)
    durations = [*seconds["F"], *seconds["B"], *seconds["I"]]
    return lambda count: _program(schedule, stages, count, vpp).seconds(durations, seconds["W"], between)


class _Levels:
    """1F1B's longest path, one level (one more forward) at a time for all ranks at once.

    With c = F + B of a rank and t the transfer from the rank before, level h of rank s follows from the one before:
    h[s] = c[s] + max(h[s - 1] + 2 t[s - 1], h[s], h[s + 1], ...), since the backwards of later ranks reach it without a
    further wait. Warm-up and cool-down are sums of the slowest forward, or backward, so far.
    """

    def __init__(self, forward: Sequence[float], backward: Sequence[float], between: Sequence[float]) -> None:
        import numpy

        self.numpy = numpy
        self.stages = len(forward)
        f, b, t = numpy.array(forward), numpy.array(backward), numpy.array((0.0, *between))
        later = numpy.arange(self.stages - 1, -1, -1)
        reach = numpy.cumsum(f + b + 2 * t)  # forwards up to a rank, and the backwards from it back to the first
        # ranks are in reverse order, so that the running maximum runs over the later ones
        start = (reach + later * numpy.maximum.accumulate(f))[::-1]
        self.cost, self.hop = (f + b)[::-1].copy(), (2 * t)[::-1][:-1].copy()
        self.cool = (later * numpy.maximum.accumulate(b))[::-1]
        self.level = start.copy()
        self.best = [numpy.maximum.accumulate(self.level)]

    def seconds(self, micro_batches: int) -> float:
        numpy, level, cost, hop = self.numpy, self.level, self.cost, self.hop
        arrival = numpy.empty(self.stages - 1)
        while len(self.best) < micro_batches:
            numpy.add(level[1:], hop, out=arrival)
            numpy.copyto(level, self.best[-1])
            numpy.maximum(level[:-1], arrival, out=level[:-1])
            numpy.add(level, cost, out=level)
            self.best.append(numpy.maximum.accumulate(level))
        last = self.best[micro_batches - self.stages : micro_batches]  # rank s is read off s levels after the first
        return float((numpy.array([row[-1 - s] for s, row in enumerate(last)])[::-1] + self.cool).max())


@dataclass(frozen=True)
class Program:
    """The actions of all ranks in one order in which each can be timed. A step is the forward or the (input's) backward
    of a micro-batch, with the weight gradients that follow before the rank waits again: (rank, index into the
    durations, the step it waits for or -1, over which boundary, index into `followers`)."""

    ranks: int
    columns: tuple[array[int], ...]  # of the steps: arrays, since a long pipeline has a hundred thousand
    followers: tuple[tuple[int, ...], ...]  # virtual stages whose weight gradients follow a step
    marks: tuple[tuple[int, int], ...]  # for each rank, a step of the full pipeline and the same one round before

    def seconds(
        self, durations: Sequence[float], weight: Sequence[float], between: Sequence[float]
    ) -> tuple[float, float]:
        """(length, what the last round of the full pipeline added: 0 with too few rounds). `durations` are of F, B and
        I by virtual stage, one kind after the other."""
        clock = [0.0] * self.ranks
        done: list[float] = []
        add = done.append
        if len(self.followers) == 1:
            for rank, duration, awaited, boundary, _ in zip(*self.columns, strict=True):
                now = clock[rank]
                if awaited >= 0:
                    arrives = done[awaited] + between[boundary]
                    if arrives > now:
                        now = arrives
                clock[rank] = now = now + durations[duration]
                add(now)
        else:
            after = [sum(weight[stage] for stage in stages) for stages in self.followers]
            for rank, duration, awaited, boundary, follow in zip(*self.columns, strict=True):
                now = clock[rank]
                if awaited >= 0:
                    arrives = done[awaited] + between[boundary]
                    if arrives > now:
                        now = arrives
                now += durations[duration]
                add(now)
                clock[rank] = now + after[follow]
        return max(clock), max((done[late] - done[early] for late, early in self.marks), default=0.0)


@lru_cache(maxsize=8)  # few: the lists of a long pipeline are large, and two callers follow each other
def cached_actions(schedule: str, stages: int, micro_batches: int, vpp: int) -> tuple[tuple[Action, ...], ...]:
    return actions(schedule, stages, micro_batches, vpp)


@lru_cache(maxsize=256)
def _program(schedule: str, stages: int, micro_batches: int, vpp: int) -> Program:
    orders, ranks = cached_actions(schedule, stages, micro_batches, vpp), stage_ranks(schedule, stages, vpp)
    count, splits = len(ranks), TABLE[schedule].splits
    away = [False, *(a != b for a, b in pairwise(ranks)), False]  # whether each boundary is between two ranks
    # The step of each pass: forwards by virtual stage and micro-batch, then backwards.
    half = count * micro_batches
    number = [-1] * (2 * half)
    steps: list[tuple[int, int, int, int, int]] = []
    followers: dict[tuple[int, ...], int] = {(): 0}
    position = [0] * stages
    remaining = sum(len(order) for order in orders)
    while remaining:
        for rank, order in enumerate(orders):
            place, stop = position[rank], len(order)
            while place < stop:
                kind, micro_batch, stage = order[place]
                if kind == "F":
                    slot, near, far, duration = stage * micro_batches + micro_batch, stage, -micro_batches, stage
                else:
                    slot, near, far = half + stage * micro_batches + micro_batch, stage + 1, micro_batches
                    duration = stage + (count if kind == "B" else 2 * count)
                awaited = number[slot + far] if away[near] else -1
                if awaited < 0 and away[near]:
                    break
                place += 1
                follow = 0
                if splits and place < stop and order[place].kind == "W":
                    first = place
                    while place < stop and order[place].kind == "W":
                        place += 1
                    late = tuple(action.stage for action in order[first:place])
                    follow = followers.setdefault(late, len(followers))
                number[slot] = len(steps)
                steps.append((rank, duration, awaited, near - 1, follow))
            remaining -= place - position[rank]
            position[rank] = place
    marks = []
    size = micro_batches // max(1, micro_batches // stages)
    for order in orders:
        full = max(place for place, action in enumerate(order) if action.kind == "F")
        _, micro_batch, stage = next(action for action in order[full:] if action.kind in "BI")
        if micro_batch >= size:
            slot = half + stage * micro_batches + micro_batch
            marks.append((number[slot], number[slot - size]))
    columns = tuple(array("i", column) for column in zip(*steps, strict=True))
    return Program(stages, columns, tuple(followers), tuple(marks))


def replayed_seconds(
    schedule: str, micro_batches: int, forward_seconds: Sequence[float], *seconds: Any, vpp: int, **options: Any
) -> float:
    """`span_seconds`, by running every action."""
    orders = actions(schedule, len(forward_seconds) // vpp, micro_batches, vpp)
    return replay(orders, forward_seconds, *seconds, **options).seconds
