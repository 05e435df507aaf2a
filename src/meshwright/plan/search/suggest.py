"""Where no layout works: why, and the nearest that does. Every suggestion has been planned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshwright.cluster import GIB, Cluster
from meshwright.errors import Problem
from meshwright.layout import Layout
from meshwright.plan.cost import Estimator, usable_bytes
from meshwright.plan.request import PlanRequest
from meshwright.plan.rules import Refusal, refusals
from meshwright.plan.rules.query import job_key, job_value, nearest_by_ratio
from meshwright.plan.search.space import (
    DEGREES,
    NARROW,
    USUAL,
    WHOLE,
    Space,
    base_layouts,
    degree_layouts,
    micro_batch_sizes,
    size,
    with_micro_batch,
)
from meshwright.plan.search.walk import OversizedLayout, complexity, explore, ranked, search

#: Changes of the pins to plan, the nearest first, before planning without any pins.
MOST_PIN_CHANGES = 12
MOST_BASE_LAYOUTS = 40_000
#: Bytes per parameter that every layout needs: a copy to compute with; master and moments if they are on the devices.
COMPUTED_BYTES, STATE_BYTES = 2, 12
#: Cluster sizes to plan between one that is too small and its double.
SIZES_BETWEEN = 32
MULTIPLES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def nearest_pins(space: Space, estimator: Estimator) -> Layout | None:
    """The layout that fits and is nearest to the pins: most keep their values, and the others change little. None where
    nothing fits with any pins."""
    planned: set[tuple[Any, ...]] = set()
    for layout in sorted(_candidates(space), key=lambda layout: _distance(layout, space.pins)):
        values = {name: getattr(layout, name) for name in space.pins}
        if tuple(values.values()) in planned:
            continue
        planned.add(tuple(values.values()))
        if fitting := search(replace(space, pins=values), estimator).fitting:
            return ranked(fitting)[0].layout
        if len(planned) == MOST_PIN_CHANGES:
            break
    free = search(replace(space, pins={}), estimator).fitting
    return min((e.layout for e in free), key=lambda layout: _distance(layout, space.pins), default=None)


def _distance(layout: Layout, pins: Mapping[str, Any]) -> tuple[float, ...]:
    """The distance of a layout from the pins: the number that differ, the number of degrees among them, the sum of the
    differences; ties go to the simpler layout."""
    differing = [name for name, value in pins.items() if getattr(layout, name) != value]
    return (
        len(differing),
        sum(name in DEGREES for name in differing),
        sum(_difference(pins[name], getattr(layout, name)) for name in differing),
        complexity(layout),
        layout.pp,
        layout.tp,
        layout.cp,
        layout.shard,
        layout.micro_batch,
    )


def _candidates(space: Space) -> Iterator[Layout]:
    """Every base layout of the space without pins; its other fields are as near to the pins as the rules allow."""
    pins, free = space.pins, replace(space, pins={})
    if size(free) > MOST_BASE_LAYOUTS:
        free = replace(free, bounds=replace(USUAL, tensor_across_nodes=True))
    recompute = pins.get("recompute", "none")
    if recompute not in free.recomputes():
        recompute = free.recomputes()[-1]
    offload = pins.get("offload", False) if pins.get("offload", False) in free.offloads() else False
    for base in base_layouts(free):
        micro = base.micro_batch
        if isinstance(pins.get("micro_batch"), int):
            micro = nearest_by_ratio(pins["micro_batch"], micro_batch_sizes(free, base))
        yield replace(base, recompute=recompute, offload=offload, micro_batch=micro)


def _difference(pin: Any, value: Any) -> float:
    if isinstance(pin, bool) or not isinstance(pin, int) or pin < 1:
        return float(pin != value)
    return abs(math.log(pin / value))


def why_no_layout(space: Space, request: PlanRequest, estimator: Estimator, suggest: bool) -> list[Problem]:
    """Why the rules leave no layout: the model or the batch itself, else every pin that cannot work alone and every
    conflict between pins. With `suggest`, each problem names the nearest layout that works."""
    free = replace(space, pins={})
    if not _has_layout(free):
        where, hint = _nearest_workload(space, estimator) if suggest else ("train.global_batch", "")
        return [Problem(request.where(where), _refusals(free)[0].reason, hint)]
    problems: list[tuple[str, str]] = []
    alone_reasons: set[str] = set()
    for name, value in space.pins.items():
        alone = replace(space, pins={name: value})
        if not _has_layout(alone):
            reasons = _reasons(alone)
            problems.append((request.where(job_key(name)), "; ".join(reasons)))
            alone_reasons |= set(reasons)
    conflicts = _conflicts(space, alone_reasons)
    if not problems or conflicts:
        involved = set[str]().union(*conflicts.values()) or set(space.pins)
        what = "; ".join(conflicts) or "; ".join(_reasons(space))
        problems.append((_places(request, [name for name in space.pins if name in involved]), what))
    hint = _nearest(space, estimator) if suggest else ""
    return [Problem(where, what, hint) for where, what in problems]


def _nearest(space: Space, estimator: Estimator) -> str:
    """The changes to the pins that lead to the nearest layout, as keys of the job file, else the number of devices."""
    layout = nearest_pins(space, estimator)
    if layout is None:
        return _more_devices(space, estimator)
    return "nearest: " + pin_words(layout, [pin for pin, value in space.pins.items() if getattr(layout, pin) != value])


def pin_words(layout: Layout, names: Iterable[str]) -> str:
    return " ".join(f"{job_key(name)}={job_value(getattr(layout, name))}" for name in names)


def _conflicts(space: Space, alone_reasons: set[str]) -> dict[str, set[str]]:
    """Reason -> its pins, for each rule that two or more pins break together, other than `alone_reasons`."""
    pinned = {refusal.reason: set(refusal.fields) & set(space.pins) for refusal in _refusals(space)}
    return {reason: pins for reason, pins in pinned.items() if reason not in alone_reasons and len(pins) > 1}


def _places(request: PlanRequest, names: list[str]) -> str:
    """Where pins were written: "job.toml:7: layout.tp, command line: layout.dp, layout.pp"."""
    by_place: dict[str, list[str]] = {}
    for name in names:
        place, _, key = request.where(job_key(name)).rpartition(": ")
        by_place.setdefault(place, []).append(key)
    return ", ".join((f"{place}: " if place else "") + ", ".join(keys) for place, keys in by_place.items())


def _has_layout(space: Space) -> bool:
    return any(True for _ in base_layouts(replace(space, bounds=WHOLE)))


def _reasons(space: Space) -> list[str]:
    """Why the rules refuse the pins, else why they refuse the layout."""
    broken = _refusals(space)
    of_pins = [refusal.reason for refusal in broken if set(refusal.fields) & set(space.pins)]
    return of_pins or [refusal.reason for refusal in broken] or ["this leaves no layout"]


def _refusals(space: Space) -> Sequence[Refusal]:
    """The broken rules of the pinned layout, in which data parallelism takes the devices that the pins leave."""
    layout = Layout(**space.pins)
    rest = max(1, layout.tp * layout.pp * layout.cp)
    if "dp" not in space.pins:
        layout = replace(layout, dp=max(1, space.workload.cluster.devices // rest))
    return refusals(space.workload.query(with_micro_batch(space, layout)))


def _nearest_workload(space: Space, estimator: Estimator) -> tuple[str, str]:
    """The key to change and the hint: the nearest global batch that has a layout, or one device where no batch has."""
    free, current = replace(space, pins={}), space.workload.global_batch
    batches = {
        batch
        for dp in {degrees.dp for degrees in degree_layouts(replace(free, bounds=WHOLE))}
        for batch in (current // dp * dp, -(-current // dp) * dp)
        if batch > 0
    }
    for batch in sorted(batches, key=lambda batch: (abs(batch - current), batch)):
        other = free.with_workload(global_batch=batch)
        if _has_layout(other) and search(other, Estimator(other.workload, estimator.profile)).fitting:
            return "train.global_batch", f"nearest: train.global_batch={batch}"
    return "cluster.devices", "nearest: cluster.devices=1"


def why_nothing_fits(
    space: Space, estimator: Estimator, near_misses: list[OversizedLayout], suggest: bool
) -> list[Problem]:
    """The layout that misses by least, by how much, and, with `suggest`, the nearest that works: with other pins, or on
    more devices."""
    closest = min(near_misses, key=lambda e: (e.peak_bytes, str(e.layout)))
    cluster, where = space.workload.cluster, "layout" if space.pins else "model"
    room, memory = usable_bytes(cluster.device), cluster.device.memory_bytes
    what = (
        f"the model does not fit {cluster} of {memory / GIB:.1f} GiB, of which a plan may use {room / GIB:.1f}: the "
        f"closest layout, {closest.layout}, needs {closest.peak_bytes / GIB:.1f} GiB a device, "
        f"{(closest.peak_bytes - room) / GIB:.1f} GiB too much"
    )
    if not suggest:
        return [Problem(where, what)]
    layout = nearest_pins(space, estimator) if space.pins else None
    if layout is not None:
        return [Problem(where, what, f"nearest that fits: {pin_words(layout, space.pins)} ({layout})")]
    return [Problem(where, what, _more_devices(space, estimator))]


def _larger_cluster(cluster: Cluster, times: int) -> Cluster:
    """`times` the devices: more nodes, or for processes on one machine, a larger node."""
    devices = cluster.devices * times
    per_node = cluster.devices_per_node if cluster.nodes > 1 or cluster.device.kind == "cuda" else devices
    return replace(cluster, devices=devices, devices_per_node=per_node)


def _more_devices(space: Space, estimator: Estimator) -> str:
    """The hint where no pins help: the smallest cluster that fits, in steps between the last doubling that does not fit
    and the first that does (for processes on one machine, the doublings alone)."""
    for times in MULTIPLES:
        doubled = _larger_cluster(space.workload.cluster, times)
        if _best_layout_on(doubled, space, estimator) is None:
            continue
        many = space.workload.cluster.nodes * times
        few = many // 2
        between = range(few + 1, many, max(1, (many - few) // SIZES_BETWEEN)) if doubled.nodes > 1 else ()
        sizes = [replace(doubled, devices=nodes * doubled.devices_per_node) for nodes in between]
        for cluster in (*sizes, doubled):
            if (best := _best_layout_on(cluster, space, estimator)) is not None:
                free = " and none of these pins" if space.pins else ""
                return f"nearest that fits: {cluster.devices} such devices{free} ({best})"
    return "nearest: a smaller model, a shorter sequence, or devices with more memory"


def _best_layout_on(cluster: Cluster, space: Space, estimator: Estimator) -> Layout | None:
    """The best layout on another cluster without pins; None where nothing fits."""
    other = replace(space.with_workload(cluster=cluster), pins={})
    if not _leanest_fits(other, estimator):
        return None
    fitting = search(other, Estimator(other.workload, estimator.profile)).fitting
    return ranked(fitting)[0].layout if fitting else None


def _leanest_fits(space: Space, estimator: Estimator) -> bool:
    """Whether any layout with full recompute and one sample per micro-batch fits (as the model's buffers allow): much
    quicker than a full search of each larger cluster."""
    workload = space.workload
    parameter_bytes = COMPUTED_BYTES if workload.framework.offers.offload else STATE_BYTES
    least = workload.card.parameter_elements * parameter_bytes / workload.cluster.devices
    if least > usable_bytes(workload.cluster.device):
        return False
    pins = {"recompute": "none"} if workload.facts.stateful_buffers else {"recompute": "full", "micro_batch": 1}
    leanest = replace(space, pins=pins, bounds=NARROW)
    return bool(explore(leanest, Estimator(leanest.workload, estimator.profile)).fitting)
