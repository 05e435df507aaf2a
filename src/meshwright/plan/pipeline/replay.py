"""A pipeline's action lists replayed in time: the reference for `length`, and the source of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.plan.pipeline.actions import Action


@dataclass(frozen=True)
class ActionSpan:
    """An action with its rank, virtual `stage` and time."""

    rank: int
    stage: int
    kind: str
    micro_batch: int
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Timeline:
    """A replayed schedule: its events in order of start, and its length."""

    ranks: int
    events: tuple[ActionSpan, ...]
    seconds: float

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds that each rank works."""
        return tuple(sum(event.stop_seconds - event.start_seconds for event in row) for row in self.rows())

    @property
    def bubble(self) -> float:
        """Idle share of ranks x seconds, 0 to 1."""
        return 1.0 - sum(self.busy_seconds) / (self.ranks * self.seconds) if self.seconds > 0 else 0.0

    def rows(self) -> tuple[tuple[ActionSpan, ...], ...]:
        """The events of each rank, in order."""
        rows: list[list[ActionSpan]] = [[] for _ in range(self.ranks)]
        for event in self.events:
            rows[event.rank].append(event)
        return tuple(tuple(row) for row in rows)


def replay(
    orders: Sequence[Sequence[Action]],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    transfer_seconds: float | Sequence[float] = 0.0,
    *,
    weight_seconds: Sequence[float] | None = None,
    overlapped: bool = True,
) -> Timeline:
    """Run the action lists of all ranks.

    Seconds are of one micro-batch through each virtual stage; `weight_seconds` is the part of the backward that
    computes weight gradients, needed where backwards are split. A forward waits for the stage before and a backward for
    the stage after, plus a transfer if that stage is on another rank: `transfer_seconds` is one figure, or one per
    boundary between virtual stages. An `overlapped` transfer runs beside the work of both ranks; another takes the
    sender's time after its work.

    Raises ValueError when the ranks wait for each other for ever, or a backward is split and `weight_seconds` is None.
    """
    timing = _ActionTiming.of(orders, forward_seconds, backward_seconds, transfer_seconds, weight_seconds, overlapped)
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * len(orders)
    position = [0] * len(orders)
    events: list[ActionSpan] = []
    remaining = sum(len(order) for order in orders)
    while remaining:
        before = remaining
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                action = order[position[rank]]
                ready = timing.ready(action, done)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                stop = start + timing.seconds[action.kind][action.stage]
                clock[rank] = stop + timing.sending[action.kind][action.stage]
                done[
                    "F" if action.kind == "F" else "W" if action.kind == "W" else "B", action.stage, action.micro_batch
                ] = clock[rank]
                events.append(ActionSpan(rank, action.stage, action.kind, action.micro_batch, start, stop))
                position[rank] += 1
                remaining -= 1
        if remaining == before:
            raise ValueError("the ranks wait for each other for ever")
    events.sort(key=lambda event: (event.start_seconds, event.rank, event.stop_seconds, event.micro_batch))
    return Timeline(len(orders), tuple(events), max(clock, default=0.0))


@dataclass(frozen=True)
class _ActionTiming:
    """Seconds by kind of action, one entry per virtual stage: `seconds` of work, of `sending` the result that takes the
    rank's own time, and of `wait` from the end of the neighbour's action to the arrival of its result."""

    seconds: dict[str, Sequence[float]]
    sending: dict[str, Sequence[float]]
    wait: dict[str, Sequence[float]]

    @staticmethod
    def of(
        orders: Sequence[Sequence[Action]],
        forward_seconds: Sequence[float],
        backward_seconds: Sequence[float],
        transfer_seconds: float | Sequence[float],
        weight_seconds: Sequence[float] | None,
        overlapped: bool,
    ) -> _ActionTiming:
        count = len(forward_seconds)
        ranks = dict.fromkeys(range(count), 0) | {a.stage: rank for rank, order in enumerate(orders) for a in order}
        between = boundary_seconds([ranks[stage] for stage in range(count)], transfer_seconds)
        splits = any(action.kind == "W" for order in orders for action in order)
        seconds = action_seconds(forward_seconds, backward_seconds, weight_seconds, splits)
        ahead, back, none = (*between, 0.0), (0.0, *between), (0.0,) * count
        if overlapped:
            return _ActionTiming(seconds, dict.fromkeys("FBIW", none), {"F": (0.0, *between), "B": (*between, 0.0)})
        return _ActionTiming(seconds, {"F": ahead, "B": back, "I": back, "W": none}, {"F": none, "B": none})

    def ready(self, action: Action, done: dict[tuple[str, int, int], float]) -> float | None:
        """When the input of an action arrives; None while that is not known."""
        kind, micro_batch, stage = action
        if kind == "W":
            return done.get(("B", stage, micro_batch))
        if kind == "F":
            if stage == 0:
                return 0.0
            arrived = done.get(("F", stage - 1, micro_batch))
            return None if arrived is None else arrived + self.wait["F"][stage]
        own = done.get(("F", stage, micro_batch))
        if own is None or stage == len(self.wait["B"]) - 1:
            return own
        arrived = done.get(("B", stage + 1, micro_batch))
        return None if arrived is None else max(own, arrived + self.wait["B"][stage])


def boundary_seconds(ranks: Sequence[int], transfer_seconds: float | Sequence[float]) -> tuple[float, ...]:
    """The transfer over each boundary between virtual stages: zero where `ranks` has both on one rank."""
    count = len(ranks) - 1
    transfers = [transfer_seconds] * count if isinstance(transfer_seconds, (int, float)) else transfer_seconds
    if len(transfers) != count:
        raise ValueError(f"{len(transfers)} transfers for {count} boundaries between stages")
    return tuple(0.0 if ranks[i] == ranks[i + 1] else float(transfers[i]) for i in range(count))


def action_seconds(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    weight_seconds: Sequence[float] | None,
    splits: bool,
) -> dict[str, Sequence[float]]:
    """Seconds by kind of action. Raises ValueError for rows of unequal length, or missing `weight_seconds`."""
    if weight_seconds is None:
        if splits:
            raise ValueError("this schedule splits backwards: give weight_seconds")
        weight_seconds = [0.0] * len(backward_seconds)
    if not len(forward_seconds) == len(backward_seconds) == len(weight_seconds):
        raise ValueError("forward, backward and weight seconds have different numbers of stages")
    inputs = [whole - weight for whole, weight in zip(backward_seconds, weight_seconds, strict=True)]
    if min(inputs, default=0.0) < 0:
        raise ValueError("weight_seconds is a part of backward_seconds and cannot be more")
    return {"F": forward_seconds, "B": backward_seconds, "I": inputs, "W": weight_seconds}
