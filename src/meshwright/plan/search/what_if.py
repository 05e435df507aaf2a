"""What a change would save (more memory, a faster link, more devices, a larger batch), and what limits a plan.

More memory only lets more layouts fit, so its savings come from the layouts that the search found too large. The other
changes are planned anew: links with the best layouts of this plan; devices and batch in the whole space, or, where that
is large, with the winner's degrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.cluster import GIB, Cluster, Link
from meshwright.divisors import divisors
from meshwright.plan.cost import Estimate, Estimator, usable_bytes
from meshwright.plan.result import WhatIf
from meshwright.plan.search.space import DEGREES, USUAL, WHOLE, Space, size
from meshwright.plan.search.walk import SearchResult, Value, explore, ranked
from meshwright.plan.search.wording import parts

#: The least share of a sample's time, or price, that is worth a line.
LEAST_SAVED = 0.02
#: The most amounts of memory to show, and the number of the best layouts to plan with a faster link.
MEMORY_STEPS, LINK_LAYOUTS = 2, 40
#: Larger spaces keep the winner's degrees when a change is planned.
MOST_LAYOUTS = 1_500
#: More memory than this many times the device's would be another device.
MOST_MEMORY = 2.0


def what_ifs(
    winner: Estimate, space: Space, estimator: Estimator, result: SearchResult, value: Value
) -> tuple[WhatIf, ...]:
    """The changes that save LEAST_SAVED or more, the best first."""
    changes = [
        *_memory(winner, space, estimator, result, value),
        *_links(winner, space, estimator, result, value),
        *(_processes if space.workload.cluster.device.kind == "cpu" else _devices)(winner, space, estimator),
        *_batch(winner, space, estimator, value),
    ]
    return tuple(sorted((one for one in changes if one.saves >= LEAST_SAVED), key=lambda one: (-one.saves, one.change)))


def limit(winner: Estimate, cluster: Cluster, result: SearchResult, estimator: Estimator) -> str:
    """What limits the plan, in words: memory where it had to be saved, else the largest part of the step."""
    layout, room = winner.layout, usable_bytes(cluster.device)
    least = winner.step_seconds * (1 - LEAST_SAVED)
    economy = [f"recompute={layout.recompute}"] * (layout.recompute != "none") + ["offload"] * layout.offload
    near = next(_quicker_misses(result, estimator, room, least), None) if economy else None
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
    winner: Estimate, space: Space, estimator: Estimator, result: SearchResult, value: Value
) -> Iterator[WhatIf]:
    """More memory: the layouts that would fit, the least memory first, each faster than the one before it."""
    device = space.workload.cluster.device
    if device.kind == "cpu":
        return  # a process has a share of the machine's memory: _processes plans fewer processes
    room, best = usable_bytes(device), value(winner)
    second_value = value(winner) / winner.step_seconds  # the devices stay the same
    for _ in range(MEMORY_STEPS):
        one = next(_quicker_misses(result, estimator, room, best / second_value * (1 - LEAST_SAVED)), None)
        if one is None:
            return
        best = one.step_seconds * second_value
        # only a share of the memory is usable, so more than the missing bytes must be added
        more = -(-(one.peak_bytes - room) * device.memory_bytes // room // GIB)
        yield WhatIf(
            f"{more} GiB more memory a device",
            one.layout,
            one.step_seconds,
            1 - one.step_seconds / winner.step_seconds,
            f"{one.layout} would fit",
        )


def _quicker_misses(result: SearchResult, estimator: Estimator, room: int, seconds: float) -> Iterator[Estimate]:
    """Layouts that do not fit and whose step is shorter than `seconds`, the smallest first."""
    near = (one for one in result.too_large if one.least_seconds < seconds and one.peak_bytes <= room * MOST_MEMORY)
    for one in sorted(near, key=lambda one: (one.peak_bytes, str(one.layout))):
        if estimator.least_seconds(one.layout) < seconds:
            estimate = estimator.estimate(one.layout)
            if estimate.step_seconds < seconds:
                yield estimate


def _links(
    winner: Estimate, space: Space, estimator: Estimator, result: SearchResult, value: Value
) -> Iterator[WhatIf]:
    """Each kind of link twice as fast."""
    cluster = space.workload.cluster
    if cluster.devices == 1:
        return
    faster: list[tuple[str, Link, Cluster]] = []
    if cluster.devices_per_node > 1:
        faster.append(("within a node", cluster.intra, replace(cluster, intra=_doubled(cluster.intra))))
    if cluster.nodes > 1:
        faster.append(("between nodes", cluster.inter, replace(cluster, inter=_doubled(cluster.inter))))
    layouts = [estimate.layout for estimate in ranked(result.fitting, value)[:LINK_LAYOUTS]]
    for where, link, changed in faster:
        other = Estimator(replace(space.workload, cluster=changed), estimator.profile)
        best = ranked([other.estimate(layout) for layout in layouts], value)[0]
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
    """One more node; where no layout uses it or it saves too little, twice the devices."""
    cluster = space.workload.cluster
    node = cluster.devices_per_node
    for devices in (cluster.devices + node, 2 * cluster.devices):
        grown = space.with_workload(cluster=replace(cluster, devices=devices))
        if (best := _best_estimate(grown, winner, estimator, ("dp", "shard"))) is None:
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
    """Fewer processes, each with more threads, on the same cores of one machine: the best count."""
    cluster, options = space.workload.cluster, []
    if cluster.nodes > 1 or not cluster.device.units:
        return
    for count in divisors(cluster.devices)[:-1]:
        fewer = cluster.in_processes(count)
        best = _best_estimate(space.with_workload(cluster=fewer), winner, estimator, ("dp", "shard", "tp", "pp"))
        if best is not None:
            options.append((best.step_seconds, count, fewer.device.units, best))
    if not options:
        return
    seconds, count, threads, best = min(options, key=lambda option: option[:2])
    saved = 1 - seconds / winner.step_seconds
    change = f"cluster.devices={count} ({threads} threads a process)"
    yield WhatIf(change, best.layout, seconds, saved, f"{best.layout}: the same cores, fewer processes to wait for")


def _batch(winner: Estimate, space: Space, estimator: Estimator, value: Value) -> Iterator[WhatIf]:
    """Twice the samples per step, which makes each wait and idle less, if the training allows it."""
    larger = space.with_workload(global_batch=2 * space.workload.global_batch)
    best = _best_estimate(larger, winner, estimator, ())
    if best is not None:
        saved = 1 - value(best) / 2 / value(winner)
        change = f"global_batch={larger.workload.global_batch}"
        yield WhatIf(
            change,
            best.layout,
            best.step_seconds,
            saved,
            f"time per sample with {best.layout}; a larger batch changes the training",
        )


def _best_estimate(space: Space, winner: Estimate, estimator: Estimator, free: tuple[str, ...]) -> Estimate | None:
    """The best layout of a changed space; a large space keeps the winner's degrees, except those that are `free`."""
    space = replace(space, bounds=WHOLE)
    if size(space, MOST_LAYOUTS) >= MOST_LAYOUTS:
        names = (name for name in (*DEGREES, "vpp", "schedule") if name not in free)
        degrees = {name: getattr(winner.layout, name) for name in names}
        space = replace(space, pins={**degrees, **space.pins}, bounds=USUAL)
    fitting = explore(space, Estimator(space.workload, estimator.profile)).fitting
    return ranked(fitting)[0] if fitting else None
