"""Micro-batches in flight on each rank of a pipeline, and the peak bytes of their activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from typing import Any

from meshwright.plan.pipeline.actions import Action, effective_schedule, stage_ranks
from meshwright.plan.pipeline.length import cached_actions

#: Up to this many rows plain Python is faster than an array.
FEW_MOMENTS = 8


def in_flight(schedule: str, stages: int, stage: int, micro_batches: int, vpp: int = 1) -> int:
    """The most micro-batches whose activations rank `stage` holds at once, counted once for each of its virtual stages;
    a micro-batch counts until its weight gradients are computed."""
    return _moments(schedule, stages, micro_batches, vpp)[stage].most


def peak_activation_bytes(
    schedule: str,
    stages: int,
    micro_batches: int,
    kept_bytes: Sequence[float],
    pending_bytes: Sequence[float] | None = None,
    *,
    vpp: int = 1,
) -> tuple[float, ...]:
    """The most bytes of activations that each rank holds at once.

    `kept_bytes` is what a micro-batch leaves in each virtual stage between its forward and the end of its backward,
    `pending_bytes` (default: the same) between the two halves of a split backward.
    """
    pending_bytes = kept_bytes if pending_bytes is None else pending_bytes
    return tuple(
        rank.bytes([kept_bytes[s] for s in rank.stages] + [pending_bytes[s] for s in rank.stages])
        for rank in _moments(schedule, stages, micro_batches, vpp)
    )


@dataclass(frozen=True)
class _Moments:
    """Micro-batches that a rank holds just before each release of activations, one row per moment. A row has one column
    per virtual stage of `stages` for micro-batches before their backward, then one each for those between the halves of
    their backward. `most` is the largest sum of a row."""

    stages: tuple[int, ...]
    most: int
    rows: Any  # a tuple of rows, or an array where there are many

    @staticmethod
    def of(order: Sequence[Action], stages: tuple[int, ...]) -> _Moments:
        index, count = {stage: place for place, stage in enumerate(stages)}, len(stages)
        counts = [0] * (2 * count)
        seen: set[tuple[int, ...]] = set()
        for kind, _, stage in order:
            place = index[stage]
            if kind == "F":
                counts[place] += 1
                continue
            seen.add(tuple(counts))
            if kind == "W":
                counts[count + place] -= 1
            else:
                counts[place] -= 1
                counts[count + place] += kind == "I"
        most = max(map(sum, seen))
        if len(seen) <= FEW_MOMENTS:
            return _Moments(stages, most, tuple(seen))
        import numpy

        return _Moments(stages, most, numpy.array(sorted(seen), dtype=numpy.float64))

    def bytes(self, sizes: list[float]) -> float:
        if isinstance(self.rows, tuple):
            return max(sum(map(mul, row, sizes)) for row in self.rows)
        return float((self.rows @ sizes).max())


def _moments(schedule: str, stages: int, micro_batches: int, vpp: int) -> tuple[_Moments, ...]:
    """The moments of each rank. Three rounds of micro-batches fill a pipeline, so more have the same moments."""
    rounds = max(1, micro_batches // stages)
    if schedule != "gpipe" and (vpp == 1 or micro_batches % rounds == 0):
        micro_batches = micro_batches // rounds * min(rounds, 3)
    return _cached_moments(schedule, stages, micro_batches, vpp)


@lru_cache(maxsize=1024)
def _cached_moments(schedule: str, stages: int, micro_batches: int, vpp: int) -> tuple[_Moments, ...]:
    schedule = effective_schedule(schedule, stages, vpp)
    if schedule in ("gpipe", "1f1b"):
        most = (micro_batches if schedule == "gpipe" else min(stages - rank, micro_batches) for rank in range(stages))
        return tuple(_Moments((rank,), count, ((count, 0),)) for rank, count in enumerate(most))
    ranks = stage_ranks(schedule, stages, vpp)
    orders = cached_actions(schedule, stages, micro_batches, vpp)
    return tuple(
        _Moments.of(order, tuple(stage for stage, at in enumerate(ranks) if at == rank))
        for rank, order in enumerate(orders)
    )
