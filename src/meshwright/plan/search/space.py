"""The space of layouts: what the rules allow and the pins leave, generated rather than filtered.

Three steps generate it: the degrees (dp tp pp cp ep, sequence parallelism); base layouts, which have everything but
micro-batch, recompute and offload; and these three, on which the rules do not depend once the micro-batch divides a
rank's share and fills the schedule. A test compares the space with every combination filtered by the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.divisors import divisors
from meshwright.layout import Layout
from meshwright.plan.pipeline import TABLE
from meshwright.plan.rules import allowed
from meshwright.plan.rules.query import fills_pipeline
from meshwright.plan.workload import Workload

DEGREES = ("dp", "shard", "tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class Bounds:
    """How much of a space is searched. Pins are never bounded.

    `ends_of_shard`: only the shard degrees 1, all, and the one that fills a node. `sequence_off`: also tensor
    parallelism without sequence parallelism. `tensor_across_nodes`: also tensor parallelism over more than a node.
    `least_tokens`: the fewest tokens that context parallelism leaves on a rank. `most_vpp`: the most virtual stages.
    """

    name: str
    ends_of_shard: bool = False
    sequence_off: bool = True
    tensor_across_nodes: bool = True
    least_tokens: int = 1
    most_vpp: int = 1_000


WHOLE = Bounds("whole")
#: These bounds leave out what loses in every published run we know: context parallelism of short pieces, tensor
#: parallelism over a network, stages cut into very many.
USUAL = Bounds("usual", tensor_across_nodes=False, sequence_off=False, least_tokens=1024, most_vpp=8)
NARROW = replace(USUAL, name="narrow", ends_of_shard=True, most_vpp=4)


@dataclass(frozen=True)
class Space:
    """The layouts of a workload to search: those with the pinned fields, within bounds."""

    workload: Workload
    pins: Mapping[str, Any]
    bounds: Bounds = WHOLE

    def with_workload(self, **fields: Any) -> Space:
        """The same space of a workload with other `fields`."""
        return replace(self, workload=replace(self.workload, **fields))

    def offers(self, name: str) -> bool:
        return name in self.workload.framework.offers.fields

    def recomputes(self) -> Sequence[str]:
        """Values of recompute to try, the cheapest in time first."""
        return self.values("recompute", self.workload.query(Layout()).recomputes)

    def offloads(self) -> Sequence[bool]:
        return self.values("offload", [False, True] if self.workload.framework.offers.offload else [False])

    def values(self, name: str, otherwise: Sequence[Any]) -> Sequence[Any]:
        """The pin of a field alone, or all of `otherwise`."""
        return [self.pins[name]] if name in self.pins else otherwise


def degrees_of(layout: Layout) -> tuple[int, ...]:
    """The degrees of a layout, by which a search groups its results."""
    return layout.dp, layout.shard, layout.tp, layout.pp, layout.cp, layout.ep


def degree_layouts(space: Space) -> Iterator[Layout]:
    """Every (dp, tp, pp, cp, ep, sequence_parallel) whose product is the devices, smallest degrees first."""
    devices, stages = space.workload.cluster.devices, space.workload.facts.stages
    for tp in space.values("tp", _tensor_sizes(space)):
        for pp in space.values("pp", [p for p in divisors(devices) if p <= stages and _allows(space, "pp", p)]):
            for cp in space.values("cp", _context_sizes(space)):
                if min(tp, pp, cp) < 1 or devices % (tp * pp * cp):
                    continue
                for dp in space.values("dp", [devices // (tp * pp * cp)]):
                    for ep in space.values("ep", _expert_sizes(space, dp * cp)):
                        for on in space.values("sequence_parallel", _sequence_values(space, tp, cp)):
                            yield Layout(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=on)


def _allows(space: Space, name: str, value: int) -> bool:
    return value == 1 or space.offers(name)


def _tensor_sizes(space: Space) -> list[int]:
    cluster = space.workload.cluster
    limit = cluster.devices if space.bounds.tensor_across_nodes else cluster.devices_per_node
    sizes = space.workload.facts.tensor_parallel_sizes(limit, space.workload.framework)
    return [t for t in sizes if _allows(space, "tp", t)]


def _context_sizes(space: Space) -> list[int]:
    if not space.offers("cp"):
        return [1]
    tokens = space.workload.facts.units_per_sample
    sizes = space.workload.facts.context_parallel_sizes(space.workload.cluster.devices)
    return [c for c in sizes if c == 1 or tokens // c >= space.bounds.least_tokens]


def _expert_sizes(space: Space, data: int) -> list[int]:
    if not space.offers("ep") or data < 1:
        return [1]
    return [e for e in space.workload.facts.expert_parallel_sizes() if data % e == 0]


def _sequence_values(space: Space, tp: int, cp: int) -> list[bool]:
    if tp <= 1 or not space.offers("sequence_parallel") or space.workload.facts.units_per_sample % (tp * cp):
        return [False]
    return [True, False] if space.bounds.sequence_off else [True]


def base_layouts(space: Space) -> Iterator[Layout]:
    """Every layout that the rules allow, whatever its micro-batch, recompute and offload, once, with allowed values of
    these. Of equal degrees, higher shard degrees come first."""
    recompute, offload = space.recomputes()[0], space.offloads()[0]
    for degrees in degree_layouts(space):
        for schedule, vpp in schedules(space, degrees):
            for shard in reversed(_shards(space, degrees)):
                base = replace(degrees, shard=shard, schedule=schedule, vpp=vpp, recompute=recompute, offload=offload)
                sizes = micro_batch_sizes(space, base)
                if sizes and allowed(space.workload.query(replace(base, micro_batch=sizes[0]))):
                    yield replace(base, micro_batch=sizes[0])


def _shards(space: Space, degrees: Layout) -> Sequence[int]:
    data = degrees.dp * degrees.cp
    if "shard" in space.pins or not space.offers("shard") or data < 1:
        return space.values("shard", [1])
    degrees_of_data = divisors(data)
    if not space.bounds.ends_of_shard:
        return degrees_of_data
    node = max(d for d in degrees_of_data if d == 1 or d * degrees.tp <= space.workload.cluster.devices_per_node)
    return sorted({1, node, data})


def schedules(space: Space, degrees: Layout) -> list[tuple[str, int]]:
    """(schedule, vpp) to try, the plainest first."""
    if degrees.pp <= 1:  # a schedule has no meaning here
        return [(s, v) for s in space.values("schedule", ["1f1b"]) for v in space.values("vpp", [1])]
    offered = space.workload.framework.offers.schedules
    pairs = []
    for schedule in space.values("schedule", sorted(offered, key=lambda word: word != "1f1b")):
        needs = TABLE.get(schedule)
        if needs is None:
            continue
        deepest = min(needs.most_vpp, space.bounds.most_vpp, space.workload.facts.blocks // degrees.pp)
        depths = range(needs.least_vpp, deepest + 1) if _allows(space, "vpp", needs.least_vpp) else range(0)
        pairs += [(schedule, vpp) for vpp in space.values("vpp", depths)]
    return pairs


def micro_batch_sizes(space: Space, base: Layout) -> list[int]:
    """Micro-batches that divide a rank's share and fill the schedule, ascending."""
    batch = space.workload.global_batch
    if base.dp < 1 or batch < 1 or batch % base.dp:
        return []
    share = batch // base.dp
    sizes = [m for m in space.values("micro_batch", divisors(share)) if m >= 1 and share % m == 0]
    if base.pp > 1:
        if base.schedule not in TABLE:
            return []
        sizes = [m for m in sizes if fills_pipeline(base, share // m, space.workload.framework)]
    if space.workload.facts.stateful_buffers:
        sizes = [m for m in sizes if m == batch]
    return sizes


def layouts(space: Space) -> Iterator[Layout]:
    """Every layout of the space: those that a search without pruning would estimate."""
    for base in base_layouts(space):
        for micro in micro_batch_sizes(space, base):
            for offload in space.offloads():
                for recompute in space.recomputes():
                    yield replace(base, micro_batch=micro, offload=offload, recompute=recompute)


def size(space: Space, stop: int = 1_000_000) -> int:
    """The number of layouts before the rules remove any, at most `stop`."""
    variants, total = len(space.offloads()) * len(space.recomputes()), 0
    for degrees in degree_layouts(space):
        pipelines = len(schedules(space, degrees)) * len(_shards(space, degrees))
        total += variants * pipelines * len(micro_batch_sizes(space, replace(degrees, schedule="gpipe")))
        if total >= stop:
            return stop
    return total


def with_micro_batch(space: Space, layout: Layout) -> Layout:
    """The layout with the schedule, virtual stages and micro-batch that the rules are most likely to allow within the
    pins: the largest micro-batch of any schedule."""
    if layout.dp < 1 or space.workload.global_batch % layout.dp:
        return layout
    candidates = [replace(layout, schedule=schedule, vpp=vpp) for schedule, vpp in schedules(space, layout)] or [layout]
    best = max(candidates, key=lambda one: max(micro_batch_sizes(space, one), default=0))  # the first of equals
    largest = max(micro_batch_sizes(space, best), default=0)
    if largest:
        return replace(best, micro_batch=largest)
    share = max(1, space.workload.global_batch // layout.dp)
    return replace(best, micro_batch=space.pins.get("micro_batch", share))
