"""Stages balanced by cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def balance_costs(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut `costs` into contiguous stages, each of one cost or more, so that the largest sum is least.

    Returns the first index of each stage. Among equally good cuts it takes the one with the lightest early stages,
    which hold the most activations. Raises ValueError for more stages than costs.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} blocks cannot make {stages} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    low = max(max(costs), sums[-1] / stages)
    best, high, _ = _cut_from_the_end(sums, stages, sums[-1] / stages + max(costs))
    while low < high * (1 - 1e-12):  # finite: low or high moves to a sum of adjacent costs each time
        cut, worst, further = _cut_from_the_end(sums, stages, (low + high) / 2)
        if worst <= (low + high) / 2 * (1 + 1e-12):
            best, high = cut, min(high, worst)
        else:
            low = further
    return best


def _cut_from_the_end(sums: Sequence[float], stages: int, cap: float) -> tuple[tuple[int, ...], float, float]:
    """Fill the last stage up to `cap`, then the one before, leaving every earlier stage at least one block.

    Returns the cut, its largest stage, and the next larger cap that changes the cut (or that largest stage, if less).
    """
    starts, stop, worst, further = [], len(sums) - 1, 0.0, float("inf")
    cap *= 1 + 1e-12
    for stage in range(stages - 1, 0, -1):
        end = sums[stop]
        stop = bisect_left(sums, end - cap, stage, stop - 1)
        starts.append(stop)
        size = end - sums[stop]
        if size > worst:
            worst = size
        if stop > stage and (more := end - sums[stop - 1]) < further:
            further = more
    worst = max(worst, sums[stop])
    return (0, *reversed(starts)), worst, min(further, worst)
