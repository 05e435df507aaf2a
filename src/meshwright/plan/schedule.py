"""The pipeline's order of work: action lists, their replay in time, what a rank holds, and stages balanced by cost.

`orders` has the lists, `replay` runs them, `span` says their length and memory quickly; this module is what the rest of
the planner sees of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from meshwright.plan.orders import TABLE, Action, Schedule, actions, fewer, places, problem
from meshwright.plan.replay import Event, Timeline, replay
from meshwright.plan.span import held_bytes, in_flight, least_span, span_seconds

__all__ = [
    "TABLE",
    "Action",
    "Event",
    "Schedule",
    "Timeline",
    "actions",
    "balance_costs",
    "fewer",
    "held_bytes",
    "in_flight",
    "least_span",
    "places",
    "problem",
    "replay",
    "replayed_seconds",
    "span_seconds",
]


def replayed_seconds(
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
    """`span_seconds`, by running every action."""
    orders = actions(schedule, len(forward_seconds) // vpp, micro_batches, vpp)
    how = {"weight_seconds": weight_seconds, "overlapped": overlapped}
    return replay(orders, forward_seconds, backward_seconds, transfer_seconds, **how).seconds  # type: ignore[arg-type]


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
    low = max(max(costs), sums[-1] / stages)
    best, high, _ = _cut_from_the_end(sums, stages, sums[-1] / stages + max(costs))
    while low < high * (1 - 1e-12):  # every turn low or high moves to a sum of neighbours, of which there are few
        cut, worst, further = _cut_from_the_end(sums, stages, (low + high) / 2)
        if worst <= (low + high) / 2 * (1 + 1e-12):
            best, high = cut, min(high, worst)
        else:
            low = further
    return best


def _cut_from_the_end(sums: Sequence[float], stages: int, cap: float) -> tuple[tuple[int, ...], float, float]:
    """Fill the last stage up to `cap`, then the one before, leaving every earlier stage at least one block.

    Returns the cut, its largest stage, and the least cap that cuts otherwise (or, if it is less, that largest stage).
    """
    starts, stop, worst, further = [], len(sums) - 1, 0.0, float("inf")
    cap *= 1 + 1e-12
    for stage in range(stages - 1, 0, -1):
        end = sums[stop]
        stop = bisect_left(sums, end - cap, stage, stop - 1)
        starts.append(stop)
        held = end - sums[stop]
        if held > worst:
            worst = held
        if stop > stage and (more := end - sums[stop - 1]) < further:
            further = more
    worst = max(worst, sums[stop])
    return (0, *reversed(starts)), worst, min(further, worst)
