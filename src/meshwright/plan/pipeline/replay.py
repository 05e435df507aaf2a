"""A pipeline's action lists replayed in time: the slow twin of `span`, and what pictures and traces are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.plan.pipeline.actions import Action


@dataclass(frozen=True)
class ActionSpan:
    """An action with its place and time. `stage` is the virtual stage."""

    rank: int
    stage: int
    kind: str
    micro_batch: int
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Timeline:
    """A replayed schedule: its events in order of start, and its length from the first start to the last stop."""

    ranks: int
    events: tuple[ActionSpan, ...]
    seconds: float

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """What each rank works."""
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
    computes weights' gradients, needed where backwards are split. A forward waits for the stage before, a backward for
    the stage after, each plus a transfer where that is another rank: `transfer_seconds` for all, or one for each
    boundary between virtual stages. A transfer runs beside the work of both ranks, or, not `overlapped`, takes the
    sender's time after its work.

    Raises ValueError when the lists wait for each other for ever, or split backwards whose halves are not known.
    """
    setting = Setting.of(orders, forward_seconds, backward_seconds, transfer_seconds, weight_seconds, overlapped)
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
                ready = setting.ready(action, done)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                stop = start + setting.seconds[action.kind][action.stage]
                clock[rank] = stop + setting.sending[action.kind][action.stage]
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
class Setting:
    """What an action takes and waits for. Rows by kind, an entry a virtual stage: `seconds` of work, `sending` what the
    sender's time takes on top, `wait` how long after the neighbour's stop its result is here."""

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
    ) -> Setting:
        count = len(forward_seconds)
        home = dict.fromkeys(range(count), 0) | {a.stage: rank for rank, order in enumerate(orders) for a in order}
        between = boundary_seconds([home[stage] for stage in range(count)], transfer_seconds)
        splits = any(action.kind == "W" for order in orders for action in order)
        seconds = action_seconds(forward_seconds, backward_seconds, weight_seconds, splits)
        ahead, back, none = (*between, 0.0), (0.0, *between), (0.0,) * count
        if overlapped:
            return Setting(seconds, dict.fromkeys("FBIW", none), {"F": (0.0, *between), "B": (*between, 0.0)})
        return Setting(seconds, {"F": ahead, "B": back, "I": back, "W": none}, {"F": none, "B": none})

    def ready(self, action: Action, done: dict[tuple[str, int, int], float]) -> float | None:
        """When the input of an action is there; None while it is not known."""
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


def boundary_seconds(home: Sequence[int], transfer_seconds: float | Sequence[float]) -> tuple[float, ...]:
    """The transfer over each boundary between virtual stages, nothing where both are on one rank (`home`)."""
    count = len(home) - 1
    given = [transfer_seconds] * count if isinstance(transfer_seconds, (int, float)) else list(transfer_seconds)
    if len(given) != count:
        raise ValueError(f"{len(given)} transfers for {count} boundaries between stages")
    return tuple(0.0 if home[i] == home[i + 1] else float(given[i]) for i in range(count))


def action_seconds(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    weight_seconds: Sequence[float] | None,
    splits: bool,
) -> dict[str, Sequence[float]]:
    """Seconds by kind of action. Raises ValueError for rows of unequal length, or unknown halves."""
    if weight_seconds is None:
        if splits:
            raise ValueError("this schedule splits backwards: say weight_seconds")
        weight_seconds = [0.0] * len(backward_seconds)
    if not len(forward_seconds) == len(backward_seconds) == len(weight_seconds):
        raise ValueError("forward, backward and weight seconds are not of equally many stages")
    inputs = [whole - weight for whole, weight in zip(backward_seconds, weight_seconds, strict=True)]
    if min(inputs, default=0.0) < 0:
        raise ValueError("weight_seconds is a part of backward_seconds and cannot be more")
    return {"F": forward_seconds, "B": backward_seconds, "I": inputs, "W": weight_seconds}
