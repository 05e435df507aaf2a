"""The space of layouts that the rules allow and the pins leave, with an estimate of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.layout import RECOMPUTE, Layout
from meshwright.plan.estimate import Estimate, Estimator
from meshwright.plan.memory import usable_bytes
from meshwright.plan.rules import Facts, Question, allowed, divisors, most_in_flight

#: A simpler layout is taken over one predicted to be faster by less than this share: no prediction is that good.
TIE = 0.01
DEGREES = ("dp", "shard", "tp", "pp")


@dataclass(frozen=True)
class Space:
    """What is searched: a model, a cluster, a batch, and the fields that are pinned."""

    card: Card
    facts: Facts
    cluster: Cluster
    global_batch: int
    pins: Mapping[str, Any]

    def question(self, layout: Layout) -> Question:
        return Question(layout, self.facts, self.cluster.devices, self.global_batch)


def degrees(space: Space) -> Iterator[Layout]:
    """Every (dp, shard, tp, pp) that the rules allow under the pins, at the pinned or smallest values of the rest."""
    facts, devices, pins = space.facts, space.cluster.devices, space.pins
    others = {name: value for name, value in pins.items() if name not in DEGREES and name != "sequence_parallel"}
    for tp in _pinned(pins, "tp", facts.tensor_parallel_sizes(devices)):
        for pp in _pinned(pins, "pp", [p for p in divisors(devices) if p <= facts.stages]):
            cp = pins.get("cp", 1)
            if min(tp, pp, cp) < 1 or devices % (tp * pp * cp):
                continue
            for dp in _pinned(pins, "dp", [devices // (tp * pp * cp)]):
                for shard in _pinned(pins, "shard", divisors(dp) if dp > 0 else [1]):
                    sequence = pins.get("sequence_parallel", tp > 1 and facts.units_per_sample % max(tp, 1) == 0)
                    layout = Layout(**{**others, "dp": dp, "shard": shard, "tp": tp, "pp": pp})
                    layout = changed(layout, sequence_parallel=sequence)
                    if allowed(space.question(with_micro(space, layout))):
                        yield layout


def _pinned(pins: Mapping[str, Any], name: str, otherwise: list[int]) -> list[int]:
    return [pins[name]] if name in pins else otherwise


def changed(layout: Layout, **changes: Any) -> Layout:
    return Layout(**{**layout.as_dict(), **changes})


def with_micro(space: Space, layout: Layout) -> Layout:
    """The layout with a micro-batch and a schedule, where they are not pinned, that no rule refuses for want of better
    ones: all of a rank's share at once, which in a pipeline takes GPipe, and under 1F1B as much as it allows."""
    if "schedule" not in space.pins and layout.pp > 1:
        layout = changed(layout, schedule="gpipe")
    if "micro_batch" in space.pins or layout.dp < 1 or space.global_batch % layout.dp:
        return layout
    share = max(1, space.global_batch // layout.dp)
    if layout.schedule == "1f1b" and 1 < layout.pp <= share:
        share = most_in_flight(share, layout.pp)
    return changed(layout, micro_batch=share)


def candidates(space: Space, layout: Layout) -> Iterator[Layout]:
    """A layout's variants in micro-batch and schedule, with as little recompute as is pinned; each allowed."""
    share = space.global_batch // layout.dp
    schedules = _pinned_word(space.pins, "schedule", ["1f1b", "gpipe"] if layout.pp > 1 else ["1f1b"])
    for micro in _pinned(space.pins, "micro_batch", divisors(share)):
        for schedule in schedules:
            variant = changed(layout, micro_batch=micro, schedule=schedule)
            if allowed(space.question(variant)):
                yield variant


def _pinned_word(pins: Mapping[str, Any], name: str, otherwise: list[str]) -> list[str]:
    return [pins[name]] if name in pins else otherwise


def estimate_all(space: Space, estimator: Estimator) -> tuple[list[Estimate], list[Estimate]]:
    """For each set of degrees the fastest variant that fits, or the one that misses by least."""
    room = usable_bytes(space.cluster.device)
    offered = [word for word in RECOMPUTE if space.facts.has_attention or word != "selective"]
    words = _pinned_word(space.pins, "recompute", offered)
    fitting, missing = [], []
    for family in degrees(space):
        found: list[Estimate] = []
        nearest: Estimate | None = None
        for variant in candidates(space, family):
            for recompute in words:
                estimate = estimator.estimate(changed(variant, recompute=recompute))
                if estimate.peak_bytes <= room:
                    found.append(estimate)
                    break  # more recompute only costs time
                if nearest is None or estimate.peak_bytes < nearest.peak_bytes:
                    nearest = estimate
        if found:
            fitting.append(ranked(found)[0])
        elif nearest is not None:
            missing.append(nearest)
    return fitting, missing


def ranked(estimates: list[Estimate]) -> list[Estimate]:
    """Fastest first; among those within TIE of the fastest, the simplest, then the leanest, comes first."""
    order = sorted(
        estimates, key=lambda e: (e.step_seconds, e.peak_bytes, tuple(map(str, e.layout.as_dict().values())))
    )
    if not order:
        return order
    tied = [e for e in order if e.step_seconds <= order[0].step_seconds * (1 + TIE)]
    return sorted(tied, key=lambda e: (_complexity(e.layout), e.step_seconds, e.peak_bytes)) + order[len(tied) :]


def _complexity(layout: Layout) -> int:
    return (
        4 * (layout.pp > 1) + 3 * (layout.tp > 1) + (layout.shard > 1) + (layout.recompute != "none")
        + (layout.schedule != "1f1b")
    )  # fmt: skip
