"""The action lists of the pipeline schedules: what each rank does, in which order.

A pipeline of `stages` ranks runs `stages` x `vpp` virtual stages. In a loop, rank r has the virtual stages r, r +
stages, r + 2 stages...; in a V (vpp = 2) it has r and 2 stages - 1 - r, so the first rank has both ends of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Action(NamedTuple):
    """One pass of a `micro_batch` through a virtual `stage`: the forward ("F"), the whole backward ("B"), or half of
    the backward: the gradient of the stage's input ("I"), which the stage before waits for, or of its weights ("W"),
    which no other rank waits for."""

    kind: str
    micro_batch: int
    stage: int


@dataclass(frozen=True)
class Schedule:
    """A rank has `least_vpp` to `most_vpp` virtual stages, in a V if `folded`; `splits`: backwards run in two halves.
    `fill` x ranks micro-batches keep every rank busy. torch's pipelining refuses fewer; a schedule whose `fill` is 2
    cannot run with fewer at all."""

    name: str
    least_vpp: int
    most_vpp: int
    folded: bool
    splits: bool
    fill: int
    source: str


MANY = 1 << 30

#: By its name in the Layout. The names are `layout.SCHEDULES`; a test holds the two together.
TABLE: dict[str, Schedule] = {
    row.name: row
    for row in (
        Schedule("gpipe", 1, 1, False, False, 0, "Huang et al. 2019, arXiv 1811.06965"),
        Schedule("1f1b", 1, 1, False, False, 1, "Narayanan et al. 2019 (PipeDream-Flush), arXiv 2006.09503"),
        Schedule("interleaved", 2, MANY, False, False, 1, "Narayanan et al. 2021, arXiv 2104.04473"),
        Schedule("zb-h1", 1, MANY, False, True, 1, "Qi et al. 2024, arXiv 2401.10241, section 2"),
        Schedule("zb-h2", 1, 1, False, True, 1, "Qi et al. 2024, arXiv 2401.10241, section 2"),
        Schedule("zbv", 2, 2, True, True, 1, "Qi et al. 2024, arXiv 2405.15362"),
        Schedule("dualpipev", 2, 2, True, True, 2, "DeepSeek-V3, arXiv 2412.19437, folded into a V"),
    )
}


def schedule_problem(schedule: str, stages: int, micro_batches: int, vpp: int = 1) -> str | None:
    """Why a schedule cannot run `micro_batches` over `stages` ranks, in words; None when it can."""
    row = TABLE.get(schedule)
    if row is None:
        return f"no schedule '{schedule}'; there are {', '.join(TABLE)}"
    if min(stages, micro_batches, vpp) < 1:
        return f"{schedule} needs a stage, a micro-batch and a virtual stage at least"
    if stages * vpp > 1 and not row.least_vpp <= vpp <= row.most_vpp:
        wants = f"{row.least_vpp}" if row.most_vpp == row.least_vpp else f"{row.least_vpp} or more"
        return f"{schedule} has {wants} virtual stages per rank, not {vpp}"
    in_rounds = stages > 1 and vpp > 1 and schedule in ("interleaved", "zb-h1")
    if in_rounds and micro_batches % _rounds(stages, micro_batches):
        near = round(micro_batches / stages) * stages
        return f"{schedule} over {stages} stages needs whole rounds of micro-batches ({near}), not {micro_batches}"
    if row.fill > 1 and stages > 1 and micro_batches < row.fill * stages:
        return f"{schedule} over {stages} ranks needs {row.fill * stages} micro-batches or more, not {micro_batches}"
    return None


def micro_batches_to_draw(schedule: str, stages: int, micro_batches: int, most: int, vpp: int = 1) -> int:
    """The largest count up to `most` that the schedule can run; if it needs more micro-batches, the smallest count."""
    for count in (*range(min(most, micro_batches), 0, -1), *range(most + 1, micro_batches)):
        if schedule_problem(schedule, stages, count, vpp) is None:
            return count
    return micro_batches


def stage_ranks(schedule: str, stages: int, vpp: int = 1) -> tuple[int, ...]:
    """The rank of each virtual stage, in the model's order."""
    if TABLE[schedule].folded:
        return (*range(stages), *reversed(range(stages)))
    return tuple(stage % stages for stage in range(stages * vpp))


def effective_schedule(schedule: str, stages: int, vpp: int = 1) -> str:
    """The schedule that really runs: with one stage there is no pipeline, so every schedule runs as 1F1B does."""
    return "1f1b" if stages * vpp == 1 else schedule


def actions(schedule: str, stages: int, micro_batches: int, vpp: int = 1) -> tuple[tuple[Action, ...], ...]:
    """Each rank's actions in order. Raises ValueError where `schedule_problem` finds a problem."""
    if (wrong := schedule_problem(schedule, stages, micro_batches, vpp)) is not None:
        raise ValueError(wrong)
    schedule = effective_schedule(schedule, stages, vpp)
    return tuple(tuple(_rank(schedule, stages, micro_batches, vpp, rank)) for rank in range(stages))


def _rank(schedule: str, stages: int, micro_batches: int, vpp: int, rank: int) -> Iterator[Action]:
    later = stages - 1 - rank
    if schedule == "gpipe":
        return _plain(rank, micro_batches, warm=micro_batches)
    if schedule == "1f1b":
        return _plain(rank, micro_batches, warm=later)
    if schedule == "zb-h2":  # twice the warm-up of 1F1B fills the time before the first backward
        return _looped(stages, micro_batches, 1, rank, warm=2 * later, pending=2 * rank)
    if schedule == "zb-h1":
        return _looped(stages, micro_batches, vpp, rank, warm=later, pending=rank)
    if schedule == "interleaved":
        return _looped(stages, micro_batches, vpp, rank, warm=2 * later, pending=None)
    if schedule == "zbv":
        return (action for action in _zbv(stages, micro_batches, rank) if action.micro_batch < micro_batches)
    return _DualPipeV(stages, micro_batches, rank).actions()


def _plain(rank: int, micro_batches: int, warm: int) -> Iterator[Action]:
    """`warm` forwards, then forwards and backwards in turn, then the remaining backwards."""
    warm = min(warm, micro_batches)
    for i in range(warm):
        yield Action("F", i, rank)
    for i in range(micro_batches - warm):
        yield Action("F", warm + i, rank)
        yield Action("B", i, rank)
    for i in range(micro_batches - warm, micro_batches):
        yield Action("B", i, rank)


def _rounds(stages: int, micro_batches: int) -> int:
    """Number of rounds in which the micro-batches go through the virtual stages of a rank."""
    return max(1, micro_batches // stages)


def _looped(
    stages: int, micro_batches: int, vpp: int, rank: int, *, warm: int, pending: int | None
) -> Iterator[Action]:
    """A rank with `vpp` virtual stages: a round of micro-batches goes through the first, then through the second...

    Starts with the forwards that bring the first round to the last virtual stage, and `warm` more. `pending` weight
    gradients are always postponed (None: backwards are whole).
    """
    round_size = micro_batches // _rounds(stages, micro_batches)
    chunks = range(rank, stages * vpp, stages)

    def passes(kind: str, order: Sequence[int]) -> list[Action]:
        return [
            Action(kind, micro_batch, stage)
            for first in range(0, micro_batches, round_size)
            for stage in order
            for micro_batch in range(first, min(first + round_size, micro_batches))
        ]

    forwards = passes("F", chunks)
    backwards = passes("B" if pending is None else "I", chunks[::-1])
    warm = min((vpp - 1) * round_size + warm, len(forwards))
    yield from forwards[:warm]
    if pending is None:
        for forward, backward in zip(forwards[warm:], backwards, strict=False):
            yield forward
            yield backward
        yield from backwards[len(forwards) - warm :]
        return
    weights = passes("W", chunks[::-1])
    for index, backward in enumerate(backwards):
        if warm + index < len(forwards):
            yield forwards[warm + index]
        yield backward
        if index >= pending:
            yield weights[index - pending]
    yield from weights[max(0, len(backwards) - pending) :]


def _zbv(stages: int, micro_batches: int, rank: int) -> Iterator[Action]:
    """ZB-V by hand: no bubble where F, I and W take equal time. Lists at least the 2 stages - 1 micro-batches that fill
    the pipeline; the caller drops the surplus."""
    count = max(2 * stages - 1, micro_batches)
    near, far = rank, 2 * stages - 1 - rank
    done = dict.fromkeys(((kind, stage) for kind in "FIW" for stage in (near, far)), 0)

    def do(kinds: str, stage: int) -> Iterator[Action]:
        for kind in kinds:
            yield Action(kind, done[kind, stage], stage)
            done[kind, stage] += 1

    for _ in range(2 * (stages - rank) - 1):
        yield from do("F", near)
    for _ in range(rank):
        yield from do("F", far)
        yield from do("F", near)
    for _ in range(stages - rank):
        yield from do("FIW", far)
    while done["F", far] < done["F", near] or done["F", near] < count:
        if done["F", near] < count:
            yield from do("F", near)
        yield from do("IW", near)
        yield from do("FIW", far)
    for _ in range(rank):
        yield from do("I", near)
        yield from do("I", far)
    for _ in range(stages - rank):
        yield from do("IW", near)
    for stage in (far, near):
        while done["W", stage] < done["I", stage]:
            yield from do("W", stage)


class _DualPipeV:
    """DualPipe's order folded into a V: forwards of one direction run beside backwards of the other; postponed weight
    gradients (`pending`) fill the ends."""

    def __init__(self, stages: int, micro_batches: int, rank: int) -> None:
        self.stages, self.micro_batches, self.rank = stages, micro_batches, rank
        self.near, self.far = rank, 2 * stages - 1 - rank
        self.done = {(kind, stage): 0 for kind in "FB" for stage in (self.near, self.far)}
        self.pending: list[tuple[int, int]] = []

    def actions(self) -> Iterator[Action]:
        later, sooner = self.stages - self.rank - 1, self.rank + 1
        near, far = self.near, self.far
        for _ in range(2 * later):
            yield self.forward(near)
        for _ in range(sooner):
            yield self.forward(near)
            yield self.forward(far)
        for _ in range(later):
            yield self.backward(far, split=True)
            yield from self.weights()
            yield self.forward(far)
        for _ in range(self.micro_batches - 2 * self.stages + sooner):
            yield self.forward(near)
            yield self.backward(far)
            yield self.forward(far)
            yield self.backward(near)
        for _ in range(later):
            yield self.backward(far)
            yield self.forward(far)
            yield self.backward(near)
        yield from self.ending(later, sooner)

    def ending(self, later: int, sooner: int) -> Iterator[Action]:
        """The last backwards, the later half of which postpones its weight gradients to the very end."""
        for index in range(sooner):
            yield self.backward(self.far, split=2 * index + 1 > sooner)
            yield self.backward(self.near, split=2 * index + 2 > sooner)
        for _ in range(later):
            yield from self.weights()
            yield self.backward(self.near, split=True)
        while self.pending:
            yield from self.weights()

    def forward(self, stage: int) -> Action:
        return Action("F", self._next("F", stage), stage)

    def backward(self, stage: int, split: bool = False) -> Action:
        micro_batch = self._next("B", stage)
        if split:
            self.pending.append((stage, micro_batch))
        return Action("I" if split else "B", micro_batch, stage)

    def weights(self) -> Iterator[Action]:
        if self.pending:
            stage, micro_batch = self.pending.pop(0)
            yield Action("W", micro_batch, stage)

    def _next(self, kind: str, stage: int) -> int:
        self.done[kind, stage] += 1
        return self.done[kind, stage] - 1
