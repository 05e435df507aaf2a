"""What a change would save, and what holds a plan back: more memory, a faster link, more devices, a larger batch.

Memory changes nothing but what fits, so what more of it would save is read off the layouts that the search found too
large. The other changes are planned anew: links for the best layouts of this plan, devices and batch within a space
held to the winner's degrees where the whole one is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.cluster import GIB, Cluster, Link
from meshwright.divisors import divisors
from meshwright.plan.cost import Estimate, Estimator, usable_bytes
from meshwright.plan.result import WhatIf
from meshwright.plan.search.space import USUAL, WHOLE, Space, size
from meshwright.plan.search.walk import SearchResult, Value, explore, ranked
from meshwright.plan.search.wording import parts

#: What saves less than this share of a sample's time, or price, is not worth a line.
LEAST_SAVED = 0.02
#: Steps of more memory that are shown at most, and the best layouts of this plan that a faster link is tried on.
MEMORY_STEPS, LINK_LAYOUTS = 2, 40
#: Spaces larger than this are held to the winner's degrees when a change is planned.
MOST_LAYOUTS = 1_500
#: More than this many times the device's memory is another device.
MOST_MEMORY = 2.0


def what_ifs(
    winner: Estimate, space: Space, estimator: Estimator, found: SearchResult, value: Value
) -> tuple[WhatIf, ...]:
    """What each change would save, the most first; only what saves LEAST_SAVED or more."""
    several = [
        *_memory(winner, space, estimator, found, value),
        *_links(winner, space, estimator, found, value),
        *(_processes if space.workload.cluster.device.kind == "cpu" else _devices)(winner, space, estimator),
        *_batch(winner, space, estimator, value),
    ]
    return tuple(sorted((one for one in several if one.saves >= LEAST_SAVED), key=lambda one: (-one.saves, one.change)))


def limit(winner: Estimate, cluster: Cluster, found: SearchResult, estimator: Estimator) -> str:
    """The binding constraint in words: memory where better layouts do not fit, else what takes the most of the step."""
    layout, room = winner.layout, usable_bytes(cluster.device)
    least = winner.step_seconds * (1 - LEAST_SAVED)
    economy = [f"recompute={layout.recompute}"] * (layout.recompute != "none") + ["offload"] * layout.offload
    near = next(_quicker(found, estimator, room, least), None) if economy else None
    if near is not None:
        gib = (near.peak_bytes - room) / GIB
        return (
            f"memory: {' and '.join(economy)} makes it fit; {near.layout} would be faster and misses by {gib:.1f} GiB"
        )
    if economy:
        return f"memory: {' and '.join(economy)} makes it fit"
    shares = parts(winner)
    most = max(shares, key=lambda name: shares[name])
    words = {
        "compute": "the devices' arithmetic",
        "launch": "the host, which cannot start operations as fast as the device does them",
        "communication": "waiting for other devices",
        "gradients": "summing gradients between devices",
        "weights": "gathering sharded weights",
        "bubble": f"idle stages, {winner.micro_batches} micro-batches through {layout.pp} stages",
        "optimizer": "the optimizer's update, bound by memory speed",
    }
    return f"{words.get(most, most)}: {shares[most] / winner.step_seconds:.0%} of the step"


def _memory(
    winner: Estimate, space: Space, estimator: Estimator, found: SearchResult, value: Value
) -> Iterator[WhatIf]:
    """The fastest layout that each further GiB would let in, as long as it is faster."""
    if space.workload.cluster.device.kind == "cpu":
        return  # a process's memory is a share of the machine's: more devices or fewer say it better
    device = space.workload.cluster.device
    room, best = usable_bytes(device), value(winner)
    each = value(winner) / winner.step_seconds  # what a second is worth: the devices are the same
    for _ in range(MEMORY_STEPS):
        one = next(_quicker(found, estimator, room, best / each * (1 - LEAST_SAVED)), None)
        if one is None:
            return
        best = one.step_seconds * each
        # usable is a share of what there is, so a little more must be there than is missing
        more = -(-(one.peak_bytes - room) * device.memory_bytes // room // GIB)
        yield WhatIf(
            f"{more} GiB more memory a device",
            one.layout,
            one.step_seconds,
            1 - one.step_seconds / winner.step_seconds,
            f"{one.layout} would fit",
        )


def _quicker(found: SearchResult, estimator: Estimator, room: int, seconds: float) -> Iterator[Estimate]:
    """Layouts that do not fit whose step is shorter than `seconds`, the nearest to fitting first."""
    near = (one for one in found.too_large if one.least_seconds < seconds and one.peak_bytes <= room * MOST_MEMORY)
    for one in sorted(near, key=lambda one: (one.peak_bytes, str(one.layout))):
        if estimator.least_seconds(one.layout) < seconds:
            estimate = estimator.estimate(one.layout)
            if estimate.step_seconds < seconds:
                yield estimate


def _links(winner: Estimate, space: Space, estimator: Estimator, found: SearchResult, value: Value) -> Iterator[WhatIf]:
    """Each kind of link twice as fast: what it saves of the step, and so how much a GB/s is worth."""
    cluster = space.workload.cluster
    if cluster.devices == 1:
        return
    named: list[tuple[str, Link, Cluster]] = []
    if cluster.devices_per_node > 1:
        named.append(("intra", cluster.intra, replace(cluster, intra=_doubled(cluster.intra))))
    if cluster.nodes > 1:
        named.append(("inter", cluster.inter, replace(cluster, inter=_doubled(cluster.inter))))
    near = ranked(found.fitting, value)[:LINK_LAYOUTS]
    for which, link, faster in named:
        other = Estimator(space.workload.changed(cluster=faster), estimator.profile)
        best = ranked([other.estimate(estimate.layout) for estimate in near], value)[0]
        where = "within a node" if which == "intra" else "between nodes"
        same = "the same layout" if best.layout == winner.layout else str(best.layout)
        yield WhatIf(
            f"{link.bytes_per_second / 1e9:.3g} GB/s more {where}",
            best.layout,
            best.step_seconds,
            1 - value(best) / value(winner),
            f"{link.name} twice as fast, with {same}",
        )


def _doubled(link: Link) -> Link:
    speeds = ("bytes_per_second", "peer_bytes_per_second", "switch_bus", "measured_bus")
    return replace(link, **{name: 2 * getattr(link, name) for name in speeds})


def _devices(winner: Estimate, space: Space, estimator: Estimator) -> Iterator[WhatIf]:
    """One node more, or one device in a single node of processes; where no layout uses that many, twice as many."""
    cluster = space.workload.cluster
    node = cluster.devices_per_node
    for devices in (cluster.devices + node, 2 * cluster.devices):
        grown = space.changed(cluster=replace(cluster, devices=devices))
        if (best := _best(grown, winner, estimator, ("dp", "shard"))) is None:
            continue
        saved = 1 - best.step_seconds / winner.step_seconds
        ideal = 1 - cluster.devices / devices
        if saved < LEAST_SAVED and devices != 2 * cluster.devices:
            continue
        share = f"{saved / ideal:.0%} of what as many more could bring" if saved > 0 else "no faster"
        more = devices - cluster.devices
        change = f"cluster.devices={devices} ({more // node} node{'s' if more > node else ''} more)"
        yield WhatIf(change, best.layout, best.step_seconds, saved, f"{best.layout}: {share}")
        return


def _processes(winner: Estimate, space: Space, estimator: Estimator) -> Iterator[WhatIf]:
    """Fewer processes, each with more threads, on the same cores of one machine: the best of all counts."""
    cluster, found = space.workload.cluster, []
    if cluster.nodes > 1 or not cluster.device.units:
        return
    for count in divisors(cluster.devices)[:-1]:
        fewer = cluster.in_processes(count)
        best = _best(space.changed(cluster=fewer), winner, estimator, ("dp", "shard", "tp", "pp"))
        if best is not None:
            found.append((best.step_seconds, count, fewer.device.units, best))
    if not found:
        return
    seconds, count, threads, best = min(found, key=lambda one: one[:2])
    saved = 1 - seconds / winner.step_seconds
    change = f"cluster.devices={count} ({threads} threads a process)"
    yield WhatIf(change, best.layout, seconds, saved, f"{best.layout}: the same cores, fewer processes to wait for")


def _batch(winner: Estimate, space: Space, estimator: Estimator, value: Value) -> Iterator[WhatIf]:
    """Twice the samples a step: less waiting and idling for each, if the training bears it."""
    larger = space.changed(global_batch=2 * space.workload.global_batch)
    best = _best(larger, winner, estimator, ())
    if best is not None:
        saved = 1 - value(best) / 2 / value(winner)
        change = f"global_batch={larger.workload.global_batch}"
        yield WhatIf(
            change, best.layout, best.step_seconds, saved, f"for a sample, with {best.layout}; it trains otherwise"
        )


def _best(space: Space, winner: Estimate, estimator: Estimator, free: tuple[str, ...]) -> Estimate | None:
    """The best layout of a changed space; of a large one, with the winner's degrees but for those that are `free`."""
    names = tuple(n for n in ("dp", "shard", "tp", "pp", "cp", "ep", "vpp", "schedule") if n not in free)
    held = {name: getattr(winner.layout, name) for name in names}
    space = replace(space, bounds=WHOLE)
    if size(space, MOST_LAYOUTS) >= MOST_LAYOUTS:
        space = replace(space, pins={**held, **space.pins}, bounds=USUAL)
    fitting = explore(space, Estimator(space.workload, estimator.profile)).fitting
    return ranked(fitting)[0] if fitting else None
