"""The space of layouts: what the rules allow and the pins leave, generated rather than filtered.

A *frame* fixes the degrees (dp tp pp cp ep, sequence parallelism); a *strand* fixes everything but the micro-batch,
recompute and offload, on which the rules do not depend once the micro-batch divides a rank's share and fills the
schedule. A test compares the space with every combination filtered by the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.divisors import divisors
from meshwright.layout import Layout
from meshwright.plan.pipeline.actions import TABLE
from meshwright.plan.rules.frameworks import FRAMEWORKS, Framework
from meshwright.plan.rules.query import Facts, Question, filled
from meshwright.plan.rules.table import allowed

DEGREES = ("dp", "shard", "tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class Bounds:
    """How much of a space is searched; a pin is never bounded.

    `ends_of_shard`: of the shard degrees only 1, all, and what fills a node. `sequence_off`: tensor parallelism without
    sequence parallelism too. `tensor_across_nodes`: tensor parallelism may reach out of a node. `least_tokens` is what
    context parallelism leaves on a rank at least, `most_vpp` the most virtual stages.
    """

    name: str
    ends_of_shard: bool = False
    sequence_off: bool = True
    tensor_across_nodes: bool = True
    least_tokens: int = 1
    most_vpp: int = 1_000


WHOLE = Bounds("whole")
#: What is left out here loses in every published run we know: context parallelism of short pieces, tensor parallelism
#: over a network, a stage cut into very many.
USUAL = Bounds("usual", tensor_across_nodes=False, sequence_off=False, least_tokens=1024, most_vpp=8)
NARROW = replace(USUAL, name="narrow", ends_of_shard=True, most_vpp=4)


@dataclass(frozen=True)
class Space:
    """What is searched: a model, a cluster, a batch, the fields that are pinned, who will run it, and how widely."""

    card: Card
    facts: Facts
    cluster: Cluster
    global_batch: int
    pins: Mapping[str, Any]
    framework: Framework = FRAMEWORKS["meshwright"]
    bounds: Bounds = WHOLE

    def question(self, layout: Layout) -> Question:
        return Question(layout, self.facts, self.cluster.devices, self.global_batch, self.framework)

    def offers(self, name: str) -> bool:
        return name in self.framework.offers.fields

    def recomputes(self) -> Sequence[str]:
        """Words of recompute to try, the cheapest in time first."""
        words = [w for w in self.framework.offers.recompute if self.facts.has_attention or w != "selective"]
        return _pinned(self.pins, "recompute", words)

    def offloads(self) -> Sequence[bool]:
        return _pinned(self.pins, "offload", [False, True] if self.framework.offers.offload else [False])


def family_of(layout: Layout) -> tuple[int, ...]:
    """The degrees of a layout, by which a search groups what it finds."""
    return layout.dp, layout.shard, layout.tp, layout.pp, layout.cp, layout.ep


def _pinned(pins: Mapping[str, Any], name: str, otherwise: Sequence[Any]) -> Sequence[Any]:
    return [pins[name]] if name in pins else otherwise


def changed(layout: Layout, **changes: Any) -> Layout:
    return replace(layout, **changes)


def frames(space: Space) -> Iterator[Layout]:
    """Every (dp, tp, pp, cp, ep, sequence_parallel) whose product is right, smallest degrees first."""
    devices, pins = space.cluster.devices, space.pins
    for tp in _pinned(pins, "tp", _tensor_sizes(space)):
        for pp in _pinned(
            pins, "pp", [p for p in divisors(devices) if p <= space.facts.stages and _may(space, "pp", p)]
        ):
            for cp in _pinned(pins, "cp", _context_sizes(space)):
                if min(tp, pp, cp) < 1 or devices % (tp * pp * cp):
                    continue
                for dp in _pinned(pins, "dp", [devices // (tp * pp * cp)]):
                    for ep in _pinned(pins, "ep", _expert_sizes(space, dp * cp)):
                        for on in _pinned(pins, "sequence_parallel", _sequence_words(space, tp, cp)):
                            yield Layout(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=on)


def _may(space: Space, name: str, value: int) -> bool:
    return value == 1 or space.offers(name)


def _tensor_sizes(space: Space) -> list[int]:
    limit = space.cluster.devices if space.bounds.tensor_across_nodes else space.cluster.devices_per_node
    return [t for t in space.facts.tensor_parallel_sizes(limit) if _may(space, "tp", t)]


def _context_sizes(space: Space) -> list[int]:
    if not space.offers("cp"):
        return [1]
    tokens = space.facts.units_per_sample
    sizes = space.facts.context_parallel_sizes(space.cluster.devices)
    return [c for c in sizes if c == 1 or tokens // c >= space.bounds.least_tokens]


def _expert_sizes(space: Space, data: int) -> list[int]:
    if not space.offers("ep") or data < 1:
        return [1]
    return [e for e in space.facts.expert_parallel_sizes() if data % e == 0]


def _sequence_words(space: Space, tp: int, cp: int) -> list[bool]:
    if tp <= 1 or not space.offers("sequence_parallel") or space.facts.units_per_sample % (tp * cp):
        return [False]
    return [True, False] if space.bounds.sequence_off else [True]


def strands(space: Space) -> Iterator[Layout]:
    """Every layout that the rules allow, less its micro-batch, recompute and offload; at allowed values of those. Of a
    frame, higher shard degrees come first."""
    recompute, offload = space.recomputes()[0], space.offloads()[0]
    for frame in frames(space):
        for schedule, vpp in pipelines(space, frame):
            for shard in reversed(_shards(space, frame)):
                strand = replace(frame, shard=shard, schedule=schedule, vpp=vpp, recompute=recompute, offload=offload)
                sizes = micros(space, strand)
                if sizes and allowed(space.question(replace(strand, micro_batch=sizes[0]))):
                    yield replace(strand, micro_batch=sizes[0])


def _shards(space: Space, frame: Layout) -> Sequence[int]:
    data = frame.dp * frame.cp
    if "shard" in space.pins or not space.offers("shard") or data < 1:
        return _pinned(space.pins, "shard", [1])
    every = divisors(data)
    if not space.bounds.ends_of_shard:
        return every
    node = max(d for d in every if d == 1 or d * frame.tp <= space.cluster.devices_per_node)
    return sorted({1, node, data})


def pipelines(space: Space, frame: Layout) -> list[tuple[str, int]]:
    """(schedule, vpp) to try, the plainest first."""
    pins = space.pins
    offered = space.framework.offers.schedules
    if frame.pp <= 1:  # a schedule says nothing here
        return [(s, v) for s in _pinned(pins, "schedule", ["1f1b"]) for v in _pinned(pins, "vpp", [1])]
    found = []
    for schedule in _pinned(pins, "schedule", sorted(offered, key=lambda word: word != "1f1b")):
        needs = TABLE.get(schedule)
        if needs is None:
            continue
        deepest = min(needs.most_vpp, space.bounds.most_vpp, space.facts.blocks // frame.pp)
        depths = range(needs.least_vpp, deepest + 1) if _may(space, "vpp", needs.least_vpp) else range(0)
        found += [(schedule, vpp) for vpp in _pinned(pins, "vpp", depths)]
    return found


def micros(space: Space, strand: Layout) -> list[int]:
    """Micro-batches that divide a rank's share and fill the strand's schedule, ascending."""
    if strand.dp < 1 or space.global_batch < 1 or space.global_batch % strand.dp:
        return []
    share = space.global_batch // strand.dp
    sizes = [m for m in _pinned(space.pins, "micro_batch", divisors(share)) if m >= 1 and share % m == 0]
    if strand.pp > 1:
        if strand.schedule not in TABLE:
            return []
        sizes = [m for m in sizes if filled(strand, share // m, space.framework)]
        if space.facts.stateful_buffers:
            sizes = [m for m in sizes if m == space.global_batch]
    return sizes


def layouts(space: Space) -> Iterator[Layout]:
    """Every layout of the space, one by one: what a search without pruning would estimate."""
    for strand in strands(space):
        for micro in micros(space, strand):
            for offload in space.offloads():
                for recompute in space.recomputes():
                    yield replace(strand, micro_batch=micro, offload=offload, recompute=recompute)


def size(space: Space, stop: int = 1_000_000) -> int:
    """How many layouts there are before the rules are asked, `stop` at most."""
    each, total = len(space.offloads()) * len(space.recomputes()), 0
    for frame in frames(space):
        pipes = pipelines(space, frame)
        total += each * len(pipes) * len(_shards(space, frame)) * len(micros(space, replace(frame, schedule="gpipe")))
        if total >= stop:
            return stop
    return total


def with_micro(space: Space, layout: Layout) -> Layout:
    """The layout with a schedule, virtual stages and a micro-batch, where they are not pinned, that no rule refuses for
    want of better ones: the largest micro-batch of the schedule that allows most."""
    if layout.dp < 1 or space.global_batch % layout.dp:
        return layout
    tried = [replace(layout, schedule=schedule, vpp=vpp) for schedule, vpp in pipelines(space, layout)] or [layout]
    best = max(tried, key=lambda one: max(micros(space, one), default=0))  # the first of equals
    largest = max(micros(space, best), default=0)
    if largest:
        return replace(best, micro_batch=largest)
    share = max(1, space.global_batch // layout.dp)
    return replace(best, micro_batch=space.pins.get("micro_batch", share))
