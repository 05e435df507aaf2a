"""When nothing works: why, and the nearest that does. Every suggestion was planned before it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from meshwright.cluster import GIB, Cluster
from meshwright.errors import Problem
from meshwright.layout import Layout
from meshwright.plan.cost import Estimator, usable_bytes
from meshwright.plan.request import PlanRequest
from meshwright.plan.rules import refusals
from meshwright.plan.rules.query import job_key, job_value, nearest_by_ratio
from meshwright.plan.search.space import (
    NARROW,
    USUAL,
    WHOLE,
    Space,
    base_layouts,
    changed,
    degree_layouts,
    micro_batch_sizes,
    size,
    with_micro_batch,
)
from meshwright.plan.search.walk import OversizedLayout, complexity, explore, ranked, search

DEGREE_PINS = ("dp", "shard", "tp", "pp", "cp", "ep")
#: Changes of the pins that are planned, the nearest first, before all the pins are let go.
TRIED = 12
MOST_BASE_LAYOUTS = 40_000
#: Bytes a parameter that no layout spares: a copy to compute with; master and moments where they stay on the devices.
COMPUTED_BYTES, STATE_BYTES = 2, 12
#: Sizes of a cluster that are tried between one that is too small and its double.
BETWEEN = 32
TIMES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def nearest_pins(space: Space, estimator: Estimator) -> Layout | None:
    """A layout that fits and whose fields, put in place of the pins, leave most of them as they are and the rest near;
    None where nothing fits, whatever the pins."""
    tried: set[tuple[Any, ...]] = set()
    for layout in sorted(_near(space), key=lambda near: _far(near, space.pins)):
        values = {name: getattr(layout, name) for name in space.pins}
        if tuple(values.values()) in tried:
            continue
        tried.add(tuple(values.values()))
        if fitting := search(replace(space, pins=values), estimator).fitting:
            return ranked(fitting)[0].layout
        if len(tried) == TRIED:
            break
    free = search(replace(space, pins={}), estimator).fitting
    return min((e.layout for e in free), key=lambda layout: _far(layout, space.pins), default=None)


def _far(layout: Layout, pins: Mapping[str, Any]) -> tuple[float, ...]:
    """How far a layout is from the pins: how many differ, of these how many degrees, and by how much."""
    differ = [name for name, value in pins.items() if getattr(layout, name) != value]
    moved = sum(name in DEGREE_PINS for name in differ)
    far = sum(_distance(pins[name], getattr(layout, name)) for name in differ)
    return (
        len(differ),
        moved,
        far,
        complexity(layout),
        layout.pp,
        layout.tp,
        layout.cp,
        layout.shard,
        layout.micro_batch,
    )


def _near(space: Space) -> Iterator[Layout]:
    """Every base layout without the pins, with the rest of its fields as near to the pins as the rules let them be."""
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
        yield changed(base, recompute=recompute, offload=offload, micro_batch=micro)


def _distance(asked: Any, found: Any) -> float:
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        return float(asked != found)
    return abs(math.log(asked / found))


def why_no_layout(space: Space, request: PlanRequest, estimator: Estimator, suggest: bool) -> list[Problem]:
    """Why the rules leave nothing: the model and the batch themselves, else every pin that cannot work alone, and
    what the pins cannot do together. With `suggest` the nearest that works is looked for."""
    free = replace(space, pins={})
    if not _has_layout(free):
        where, hint = _nearest_question(space, estimator) if suggest else ("train.global_batch", "")
        broken = refusals(space.workload.query(_guess(free)))
        return [Problem(request.where(where), broken[0].reason, hint)]
    problems: list[tuple[str, str]] = []
    known: set[str] = set()
    for name, value in space.pins.items():
        alone = replace(space, pins={name: value})
        if not _has_layout(alone):
            reasons = _reasons(alone)
            problems.append((request.where(job_key(name)), "; ".join(reasons)))
            known |= set(reasons)
    together = _together(space, known)
    if not problems or together:
        what = "; ".join(together) or "; ".join(_reasons(space))
        problems.append((_places(request, _concerned(space, together)), what))
    hint = _nearest(space, estimator) if suggest else ""
    return [Problem(where, what, hint) for where, what in problems]


def _nearest(space: Space, estimator: Estimator) -> str:
    """The nearest pins that plan together, those that must change in words of the job file; where none does, what would
    fit."""
    found = nearest_pins(space, estimator)
    if found is None:
        return _more_devices(space, estimator)
    return "nearest: " + said(found, [name for name, value in space.pins.items() if getattr(found, name) != value])


def said(layout: Layout, names: Iterable[str]) -> str:
    return " ".join(f"{job_key(name)}={job_value(getattr(layout, name))}" for name in names)


def _together(space: Space, known: set[str]) -> dict[str, set[str]]:
    """Reason -> its pins, of each rule that two pins or more break together and that is not among those `known`."""
    broken = refusals(space.workload.query(_guess(space)))
    pinned = {refusal.reason: set(refusal.fields) & set(space.pins) for refusal in broken}
    return {reason: pins for reason, pins in pinned.items() if reason not in known and len(pins) > 1}


def _places(request: PlanRequest, names: list[str]) -> str:
    """Where several pins were said: "job.toml:7: layout.tp, command line: layout.dp, layout.pp"."""
    by_place: dict[str, list[str]] = {}
    for name in names:
        place, _, key = request.where(job_key(name)).rpartition(": ")
        by_place.setdefault(place, []).append(key)
    return ", ".join((f"{place}: " if place else "") + ", ".join(keys) for place, keys in by_place.items())


def _concerned(space: Space, together: Mapping[str, set[str]]) -> list[str]:
    concerned: set[str] = set().union(*together.values())
    return [name for name in space.pins if name in concerned or not concerned]


def _has_layout(space: Space) -> bool:
    return any(True for _ in base_layouts(replace(space, bounds=WHOLE)))


def _reasons(space: Space) -> list[str]:
    """The rules that a single pin breaks, else any that is broken."""
    broken = refusals(space.workload.query(_guess(space)))
    mine = [refusal.reason for refusal in broken if set(refusal.fields) & set(space.pins)]
    return mine or [refusal.reason for refusal in broken] or ["this leaves no layout"]


def _guess(space: Space) -> Layout:
    """The layout that the pins suggest, allowed or not: data parallelism takes the devices that are left."""
    layout = Layout(**space.pins)
    rest = max(1, layout.tp * layout.pp * layout.cp)
    if "dp" not in space.pins:
        layout = changed(layout, dp=max(1, space.workload.cluster.devices // rest))
    return with_micro_batch(space, layout)


def _nearest_question(space: Space, estimator: Estimator) -> tuple[str, str]:
    """Where to change what, so that there is a layout: the global batch, or where no batch helps the devices."""
    free, have = replace(space, pins={}), space.workload.global_batch
    batches = {
        batch
        for dp in {degrees.dp for degrees in degree_layouts(replace(free, bounds=WHOLE))}
        for batch in (have // dp * dp, -(-have // dp) * dp)
        if batch > 0
    }
    for batch in sorted(batches, key=lambda batch: (abs(batch - have), batch)):
        other = free.changed(global_batch=batch)
        if _has_layout(other) and search(other, Estimator(other.workload, estimator.profile)).fitting:
            return "train.global_batch", f"nearest: train.global_batch={batch}"
    return "cluster.devices", "nearest: cluster.devices=1"


def why_nothing_fits(
    space: Space, estimator: Estimator, missing: list[OversizedLayout], suggest: bool
) -> list[Problem]:
    """The layout that misses by least, by how much, and, with `suggest`, the nearest that works: pins dropped, or more
    devices."""
    closest = min(missing, key=lambda e: (e.peak_bytes, str(e.layout)))
    room = usable_bytes(space.workload.cluster.device)
    have = space.workload.cluster.device.memory_bytes / GIB
    what = (
        f"the model does not fit {space.workload.cluster} of {have:.1f} GiB, {room / GIB:.1f} of them to be filled: the closest "
        f"layout, {closest.layout}, needs {closest.peak_bytes / GIB:.1f} GiB a device, "
        f"{(closest.peak_bytes - room) / GIB:.1f} GiB too much"
    )
    if not suggest:
        return [Problem("layout" if space.pins else "model", what)]
    found = nearest_pins(space, estimator) if space.pins else None
    if found is not None:
        return [Problem("layout", what, f"nearest that fits: {said(found, space.pins)} ({found})")]
    return [Problem("layout" if space.pins else "model", what, _more_devices(space, estimator))]


def larger(cluster: Cluster, times: int) -> Cluster:
    """`times` the devices: more nodes of a cluster that has some, or that a GPU's node cannot hold."""
    devices = cluster.devices * times
    per_node = cluster.devices_per_node if cluster.nodes > 1 or cluster.device.kind == "cuda" else devices
    return replace(cluster, devices=devices, devices_per_node=per_node)


def _more_devices(space: Space, estimator: Estimator) -> str:
    """What would do where no pins help: the fewest nodes (of a single node, the fewest times its devices) that were
    found to do, between the last doubling that does not and the first that does."""
    for times in TIMES:
        doubled = larger(space.workload.cluster, times)
        if _grown(space, estimator, doubled) is None:
            continue
        few, many = space.workload.cluster.nodes * times // 2, space.workload.cluster.nodes * times
        between = range(few + 1, many, max(1, (many - few) // BETWEEN)) if doubled.nodes > 1 else ()
        sizes = [replace(doubled, devices=nodes * doubled.devices_per_node) for nodes in between]
        for cluster in (*sizes, doubled):
            if (best := _grown(space, estimator, cluster)) is not None:
                free = " and none of these pins" if space.pins else ""
                return f"nearest that fits: {cluster.devices} such devices{free} ({best})"
    return "nearest: a smaller model, a shorter sequence, or devices with more memory"


def _grown(space: Space, estimator: Estimator, cluster: Cluster) -> Layout | None:
    """The best layout on another cluster, the pins let go; None where nothing fits."""
    grown = replace(space.changed(cluster=cluster), pins={})
    if not _leanest_fits(grown, estimator):
        return None
    fitting = search(grown, Estimator(grown.workload, estimator.profile)).fitting
    return ranked(fitting)[0].layout if fitting else None


def _leanest_fits(space: Space, estimator: Estimator) -> bool:
    """Whether any layout fits that computes everything again and takes a sample at a time. Full searches of ever larger
    clusters, of which none fits, would take minutes."""
    room = usable_bytes(space.workload.cluster.device)
    offloads = space.workload.framework.offers.offload
    least = (
        space.workload.card.parameter_elements
        * (COMPUTED_BYTES if offloads else STATE_BYTES)
        / space.workload.cluster.devices
    )
    if least > room:
        return False
    pins = {"recompute": "full"} if space.workload.facts.stateful_buffers else {"recompute": "full", "micro_batch": 1}
    leanest = replace(space, pins=pins, bounds=NARROW)
    return bool(explore(leanest, Estimator(leanest.workload, estimator.profile)).fitting)
