"""Stages balanced by cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


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
