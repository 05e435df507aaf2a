"""The pipeline's order of work: the action list of each stage, its replay in time, and stages balanced by cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """One thing a stage does: the forward ("F") or backward ("B") of a micro-batch."""

    kind: str
    micro_batch: int


@dataclass(frozen=True)
class Event:
    """An action with its place and time."""

    stage: int
    kind: str
    micro_batch: int
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Timeline:
    """A replayed schedule: its events in order of start, its length, and the share of device time left idle."""

    stages: int
    events: tuple[Event, ...]
    seconds: float

    @property
    def bubble(self) -> float:
        """Idle share of stages x seconds, 0 to 1."""
        busy = sum(event.stop_seconds - event.start_seconds for event in self.events)
        return 1.0 - busy / (self.stages * self.seconds) if self.seconds > 0 else 0.0


def actions(schedule: str, stages: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """Each stage's actions in order. "gpipe": all forwards, then all backwards (Huang et al. 2019). "1f1b": warm up
    with one forward for each later stage, then alternate (Narayanan et al. 2021). Raises ValueError for other words.
    """
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f"no schedule '{schedule}'")
    lists = []
    for stage in range(stages):
        warm = micro_batches if schedule == "gpipe" else min(stages - stage - 1, micro_batches)
        steady = micro_batches - warm
        order = [Action("F", i) for i in range(warm)]
        for i in range(steady):
            order += [Action("F", warm + i), Action("B", i)]
        order += [Action("B", i) for i in range(steady, micro_batches)]
        lists.append(tuple(order))
    return tuple(lists)


def in_flight(schedule: str, stages: int, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at its worst moment."""
    return micro_batches if schedule == "gpipe" else min(stages - stage, micro_batches)


def replay(
    orders: Sequence[Sequence[Action]],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    transfer_seconds: float = 0.0,
) -> Timeline:
    """Run the action lists: a forward waits for the stage before, a backward for the stage after, plus the transfer.

    Raises ValueError when the lists wait for each other for ever.
    """
    stages = len(orders)
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * stages
    position = [0] * stages
    events: list[Event] = []
    remaining = sum(len(order) for order in orders)
    while remaining:
        before = remaining
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                action = order[position[stage]]
                ready = _ready(action, stage, stages, done, transfer_seconds)
                if ready is None:
                    break
                seconds = (forward_seconds if action.kind == "F" else backward_seconds)[stage]
                start = max(clock[stage], ready)
                clock[stage] = done[action.kind, stage, action.micro_batch] = start + seconds
                events.append(Event(stage, action.kind, action.micro_batch, start, start + seconds))
                position[stage] += 1
                remaining -= 1
        if remaining == before:
            raise ValueError("the stages wait for each other for ever")
    events.sort(key=lambda event: (event.start_seconds, event.stage, event.micro_batch))
    return Timeline(stages, tuple(events), max(clock, default=0.0))


def _ready(
    action: Action, stage: int, stages: int, done: dict[tuple[str, int, int], float], transfer_seconds: float
) -> float | None:
    """When the input of an action is there; None while it is not known."""
    if action.kind == "F":
        if stage == 0:
            return 0.0
        arrived = done.get(("F", stage - 1, action.micro_batch))
        return None if arrived is None else arrived + transfer_seconds
    own = done.get(("F", stage, action.micro_batch))
    if own is None:
        return None
    if stage == stages - 1:
        return own
    arrived = done.get(("B", stage + 1, action.micro_batch))
    return None if arrived is None else max(own, arrived + transfer_seconds)


def span_seconds(
    schedule: str,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    transfer_seconds: float = 0.0,
) -> float:
    """Length of the schedule in closed form, for the search; equals the replay where stages are equal and transfers
    are free: (micro_batches + stages - 1) x (forward + backward)."""
    once = sum(forward_seconds) + sum(backward_seconds) + 2 * transfer_seconds * (len(forward_seconds) - 1)
    if schedule == "gpipe":
        slowest = max(forward_seconds) + max(backward_seconds)
    else:
        slowest = max(f + b for f, b in zip(forward_seconds, backward_seconds, strict=True))
    return once + (micro_batches - 1) * slowest


def balance_costs(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut `costs` into contiguous stages, each with one or more, whose largest sum is least.

    Returns the first index of each stage. Of equally good cuts it takes the one whose early stages are light: they
    hold the most activations. Raises ValueError for more stages than costs.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} blocks cannot make {stages} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    low, high = max(max(costs), sums[-1] / stages), sums[-1]
    best = _cut_from_the_end(sums, stages, high)
    for _ in range(60):
        if high - low <= 1e-12 * high:
            break
        middle = (low + high) / 2
        cut = _cut_from_the_end(sums, stages, middle)
        worst = max(sums[stop] - sums[start] for start, stop in zip(cut, (*cut[1:], count), strict=True))
        if worst <= middle * (1 + 1e-12):
            best, high = cut, min(middle, worst)
        else:
            low = middle
    return best


def _cut_from_the_end(sums: Sequence[float], stages: int, cap: float) -> tuple[int, ...]:
    """Fill the last stage up to `cap`, then the one before, leaving every earlier stage at least one block."""
    starts, stop = [], len(sums) - 1
    for stage in range(stages - 1, 0, -1):
        start = stop - 1
        while start > stage and sums[stop] - sums[start - 1] <= cap * (1 + 1e-12):
            start -= 1
        starts.append(start)
        stop = start
    return (0, *reversed(starts))
