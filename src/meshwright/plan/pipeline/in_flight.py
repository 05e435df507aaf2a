"""What each rank of a pipeline holds at its worst moment: micro-batches in flight, and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from typing import Any

from meshwright.plan.pipeline.actions import Action, in_effect, places
from meshwright.plan.pipeline.length import orders_of

#: Rows of moments up to which plain Python is faster than an array.
FEW_MOMENTS = 8


def in_flight(schedule: str, stages: int, stage: int, micro_batches: int, vpp: int = 1) -> int:
    """Micro-batches that rank `stage` holds activations of at its worst moment, counted once for each of its virtual
    stages; one whose weights' gradients are still to come counts like any other."""
    return _moments(schedule, stages, _enough(schedule, stages, micro_batches, vpp), vpp)[stage].most


def held_bytes(
    schedule: str,
    stages: int,
    micro_batches: int,
    kept_bytes: Sequence[float],
    pending_bytes: Sequence[float] | None = None,
    *,
    vpp: int = 1,
) -> tuple[float, ...]:
    """Bytes of activations that each rank holds at its worst moment.

    `kept_bytes` is what a micro-batch leaves in each virtual stage between its forward and the end of its backward,
    `pending_bytes` (as much, where it is not said) between the two halves of a split backward.
    """
    pending_bytes = kept_bytes if pending_bytes is None else pending_bytes
    ranks = _moments(schedule, stages, _enough(schedule, stages, micro_batches, vpp), vpp)
    return tuple(
        rank.bytes([kept_bytes[s] for s in rank.mine] + [pending_bytes[s] for s in rank.mine]) for rank in ranks
    )


@dataclass(frozen=True)
class _Moments:
    """What a rank with the virtual stages `mine` holds just before it gives something back, a row a moment: its
    micro-batches before their backward, a column a virtual stage, then those inside. `most` is the largest sum."""

    mine: tuple[int, ...]
    most: int
    rows: Any  # a tuple of rows, or where there are many an array

    @staticmethod
    def of(order: Sequence[Action], mine: tuple[int, ...]) -> _Moments:
        index, count = {stage: place for place, stage in enumerate(mine)}, len(mine)
        held = [0] * (2 * count)
        seen: set[tuple[int, ...]] = set()
        for kind, _, stage in order:
            place = index[stage]
            if kind == "F":
                held[place] += 1
                continue
            seen.add(tuple(held))
            if kind == "W":
                held[count + place] -= 1
            else:
                held[place] -= 1
                held[count + place] += kind == "I"
        most = max(map(sum, seen))
        if len(seen) <= FEW_MOMENTS:
            return _Moments(mine, most, tuple(seen))
        import numpy

        return _Moments(mine, most, numpy.array(sorted(seen), dtype=numpy.float64))

    def bytes(self, sizes: list[float]) -> float:
        if isinstance(self.rows, tuple):
            return max(sum(map(mul, row, sizes)) for row in self.rows)
        return float((self.rows @ sizes).max())


def _enough(schedule: str, stages: int, micro_batches: int, vpp: int) -> int:
    """Fewer micro-batches whose worst moments are those of `micro_batches`: the pipeline is full with them."""
    if schedule == "gpipe":
        return micro_batches
    rounds = max(1, micro_batches // stages)
    return micro_batches // rounds * min(rounds, 3) if vpp == 1 or micro_batches % rounds == 0 else micro_batches


@lru_cache(maxsize=1024)
def _moments(schedule: str, stages: int, micro_batches: int, vpp: int) -> tuple[_Moments, ...]:
    schedule = in_effect(schedule, stages, vpp)
    if schedule in ("gpipe", "1f1b"):
        most = (micro_batches if schedule == "gpipe" else min(stages - rank, micro_batches) for rank in range(stages))
        return tuple(_Moments((rank,), count, ((count, 0),)) for rank, count in enumerate(most))
    home = places(schedule, stages, vpp)
    orders = orders_of(schedule, stages, micro_batches, vpp)
    mine = [tuple(stage for stage, at in enumerate(home) if at == rank) for rank in range(stages)]
    return tuple(_Moments.of(order, own) for order, own in zip(orders, mine, strict=True))
