"""When nothing works: why, and the nearest that does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from meshwright.cluster import Cluster
from meshwright.errors import Problem
from meshwright.layout import Layout
from meshwright.plan.estimate import Estimate, Estimator
from meshwright.plan.memory import usable_bytes
from meshwright.plan.result import PlanRequest
from meshwright.plan.rules import allowed, divisors, key_of, nearest_of, refusals, word
from meshwright.plan.space import DEGREES, Space, changed, degrees, estimate_all, ranked, with_micro

GIB = 1024**3


def nearest_working(space: Space) -> Layout:
    """The allowed layout, pins aside, that keeps most of the pins and stays nearest to the rest; there must be one."""
    free = replace(space, pins={})
    best: tuple[tuple[float, ...], Layout] | None = None
    for family in degrees(free):
        for variant in _variants_near(free, family, space.pins):
            far = sum(_distance(value, getattr(variant, name)) for name, value in space.pins.items())
            differ = sum(getattr(variant, name) != value for name, value in space.pins.items())
            moved = sum(getattr(variant, name) != value for name, value in space.pins.items() if name in DEGREES)
            key = (float(differ), float(moved), far, float(variant.pp), float(variant.tp), float(variant.shard))
            if best is None or key < best[0]:
                best = (key, variant)
    assert best is not None
    return best[1]


def _variants_near(space: Space, family: Layout, pins: Mapping[str, Any]) -> Iterator[Layout]:
    """The family with as many of the other pins as the rules allow, one at a time."""
    layout = with_micro(space, family)
    if "schedule" in pins:  # before the rest: it decides which micro-batches there can be
        scheduled = with_micro(replace(space, pins={"schedule": 0}), changed(layout, schedule=pins["schedule"]))
        layout = scheduled if allowed(space.question(scheduled)) else layout
    for name, value in pins.items():
        if name in DEGREES or name == "schedule":
            continue
        if name == "micro_batch" and isinstance(value, int):
            shares = divisors(space.global_batch // layout.dp)
            good = [d for d in shares if allowed(space.question(changed(layout, micro_batch=d)))]
            value = nearest_of(value, good or shares)
        variant = changed(layout, **{name: value})
        if allowed(space.question(variant)):
            layout = variant
    yield layout


def _distance(asked: Any, found: Any) -> float:
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        return float(asked != found)
    return abs(math.log(asked / found))


def why_no_layout(space: Space, request: PlanRequest) -> list[Problem]:
    """Why the rules leave nothing: the model and the batch themselves, else every pin that cannot work alone, and
    what the pins cannot do together."""
    if not _has_layout(replace(space, pins={})):
        where, hint = _nearest_question(space)
        broken = refusals(space.question(_guess(replace(space, pins={}))))
        return [Problem(request.where(where), broken[0].reason, hint)]
    problems: list[Problem] = []
    known: set[str] = set()
    for name, value in space.pins.items():
        alone = replace(space, pins={name: value})
        if not _has_layout(alone):
            near, reasons = nearest_working(alone), _reasons(alone)
            problems.append(Problem(request.where(key_of(name)), "; ".join(reasons), _said(near, (name,))))
            known |= set(reasons)
    together = _together(space, known)
    if not problems or together:
        names = tuple(space.pins)
        where = _places(request, _concerned(space, together))
        what = "; ".join(together) or "these pins leave no layout"
        problems.append(Problem(where, what, _said(nearest_working(space), names)))
    return problems


def _together(space: Space, known: set[str]) -> dict[str, set[str]]:
    """Reason -> its pins, of each rule that two pins or more break together and that is not among those `known`."""
    broken = refusals(space.question(_guess(space)))
    pinned = {refusal.reason: set(refusal.fields) & set(space.pins) for refusal in broken}
    return {reason: pins for reason, pins in pinned.items() if reason not in known and len(pins) > 1}


def _places(request: PlanRequest, names: list[str]) -> str:
    """Where several pins were said: "job.toml:7: layout.tp, command line: layout.dp, layout.pp"."""
    by_place: dict[str, list[str]] = {}
    for name in names:
        place, _, key = request.where(key_of(name)).rpartition(": ")
        by_place.setdefault(place, []).append(key)
    return ", ".join((f"{place}: " if place else "") + ", ".join(keys) for place, keys in by_place.items())


def _concerned(space: Space, together: Mapping[str, set[str]]) -> list[str]:
    concerned: set[str] = set().union(*together.values())
    return [name for name in space.pins if name in concerned or not concerned]


def _has_layout(space: Space) -> bool:
    return any(True for _ in degrees(space))


def _said(layout: Layout, names: tuple[str, ...]) -> str:
    return "nearest: " + " ".join(f"{key_of(name)}={word(getattr(layout, name))}" for name in names)


def _reasons(space: Space) -> list[str]:
    """The rules that a single pin breaks, else any that is broken."""
    broken = refusals(space.question(_guess(space)))
    mine = [refusal.reason for refusal in broken if set(refusal.fields) & set(space.pins)]
    return mine or [refusal.reason for refusal in broken] or ["this leaves no layout"]


def _guess(space: Space) -> Layout:
    """The layout that the pins suggest, allowed or not: data parallelism takes the devices that are left."""
    layout = Layout(**space.pins)
    rest = max(1, layout.tp * layout.pp * layout.cp)
    if "dp" not in space.pins:
        layout = changed(layout, dp=max(1, space.cluster.devices // rest))
    return with_micro(space, layout)


def _nearest_question(space: Space) -> tuple[str, str]:
    """Where to change what, so that there is a layout: the global batch, or where no batch helps the devices."""
    divisible = replace(space, pins={}, global_batch=space.cluster.devices)  # divisible by every dp
    batches = [
        batch
        for dp in {family.dp for family in degrees(divisible)}
        for batch in (space.global_batch // dp * dp, -(-space.global_batch // dp) * dp)
        if batch > 0 and _has_layout(replace(divisible, global_batch=batch))
    ]
    if batches:
        near = min(batches, key=lambda batch: (abs(batch - space.global_batch), batch))
        return "train.global_batch", f"nearest: train.global_batch={near}"
    return "cluster.devices", "nearest: cluster.devices=1"


def why_nothing_fits(
    space: Space, request: PlanRequest, estimator: Estimator, missing: list[Estimate]
) -> list[Problem]:
    """The layout that misses by least, by how much, and the nearest that works: pins dropped, or more devices."""
    closest = min(missing, key=lambda e: (e.peak_bytes, str(e.layout)))
    room = usable_bytes(space.cluster.device)
    have = space.cluster.device.memory_bytes / GIB
    what = (
        f"the model does not fit {space.cluster} of {have:.1f} GiB: the closest layout, {closest.layout}, "
        f"needs {closest.peak_bytes / GIB:.1f} GiB a device, {(closest.peak_bytes - room) / GIB:.1f} GiB too much"
    )
    return [Problem("layout" if space.pins else "model", what, _nearest_fit(space, request, estimator))]


def _nearest_fit(space: Space, request: PlanRequest, estimator: Estimator) -> str:
    if space.pins:
        free = replace(space, pins={})
        fitting, _ = estimate_all(free, estimator)
        if fitting:
            best = _nearest_to_pins(fitting, space.pins)
            changes = {n: getattr(best.layout, n) for n in (*DEGREES, "sequence_parallel", "micro_batch", "recompute")}
            said = " ".join(
                f"{key_of(n)}={word(v)}" for n, v in changes.items() if space.pins.get(n, v) != v or n in space.pins
            )
            return f"nearest that fits: {said} ({best.layout})"
    cluster = space.cluster
    for times in (2, 4, 8, 16, 32, 64, 128):
        per_node = cluster.devices_per_node if cluster.nodes > 1 else cluster.devices * times
        per_node = min(per_node, cluster.devices_per_node) if cluster.device.kind == "cuda" else per_node
        larger = Cluster(
            cluster.device, cluster.devices * times, per_node, cluster.intra, cluster.inter, cluster.dollars_per_hour
        )
        grown = replace(space, cluster=larger, pins={})
        fitting, _ = estimate_all(grown, Estimator(space.card, larger, space.global_batch, estimator.precision))
        if fitting:
            return f"nearest that fits: {larger.devices} such devices ({ranked(fitting)[0].layout})"
    return "nearest: a smaller model, a shorter sequence, or devices with more memory"


def _nearest_to_pins(fitting: list[Estimate], pins: Mapping[str, Any]) -> Estimate:
    def far(estimate: Estimate) -> tuple[float, float]:
        differ = sum(getattr(estimate.layout, name) != value for name, value in pins.items())
        return float(differ), estimate.step_seconds

    return min(fitting, key=far)
