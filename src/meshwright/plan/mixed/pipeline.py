"""A pipeline through groups of different devices: the stages of each group, and the blocks of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import permutations

from meshwright.cluster import Cluster
from meshwright.divisors import divisors
from meshwright.layout import Layout
from meshwright.plan.cost import StageMemory, usable_bytes
from meshwright.plan.cost.memory import slack_bytes
from meshwright.plan.cost.per_step import PerStepCost
from meshwright.plan.mixed.cluster import MixedChoice, MixedWorkload, mfu
from meshwright.plan.pipeline import span_seconds
from meshwright.plan.result import Share
from meshwright.plan.rules import allowed
from meshwright.plan.search.wording import choice_of

HALVINGS = 40
#: The parts of a stage's memory that are sums over its blocks; of the others, the largest block counts.
ADDED = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class BlockEstimates:
    """Each block on one group's devices: seconds per micro-batch, and memory."""

    group: Cluster
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    memory: tuple[StageMemory, ...]
    transfer: float
    micro_batches: int
    outside: tuple[float, float, float]  # seconds of waits, optimizer and host outside the pipeline, with every block
    _limits: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    def cost(self, block: int) -> float:
        return self.forward[block] + self.backward[block]

    @cached_property
    def total(self) -> float:
        return sum(self.forward) + sum(self.backward)

    def stage(self, start: int, stop: int, in_flight: int) -> StageMemory:
        """Memory of a stage of the blocks from `start` to `stop`."""
        mine = self.memory[start:stop]
        sums = {}
        for one in fields(StageMemory):
            values = [getattr(memory, one.name) for memory in mine]
            if one.name == "activations":  # a pipeline of single blocks under GPipe holds every micro-batch
                sums[one.name] = sum(values) * in_flight // self.micro_batches
            else:
                sums[one.name] = sum(values) if one.name in ADDED else max(values)
        moving, states = sums["activations"] + sums["buffers"], sum(sums[name] for name in ADDED)
        sums["slack"] = slack_bytes(self.group.device, moving, moving + states)
        return StageMemory(**sums)

    def limit(self, start: int, in_flight: int) -> int:
        """The first block that no longer fits on a stage that begins with `start`."""
        if (start, in_flight) not in self._limits:
            room, stop = usable_bytes(self.group.device), start
            fixed = activations = buffers = process = 0
            for memory in self.memory[start:]:  # as `stage`, the slow twin
                fixed += memory.weights + memory.gradients + memory.optimizer
                activations += memory.activations
                buffers, process = max(buffers, memory.buffers), max(process, memory.process)
                moving = activations * in_flight // self.micro_batches + buffers
                if fixed + moving + slack_bytes(self.group.device, moving, fixed + moving) + process > room:
                    break
                stop += 1
            self._limits[start, in_flight] = stop
        return self._limits[start, in_flight]


@dataclass(frozen=True)
class PipelineCut:
    """A pipeline cut into stages: of each stage its group and first block; and the step."""

    layout: Layout
    blocks: tuple[BlockEstimates, ...]  # on the group of each stage
    firsts: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    memory: tuple[StageMemory, ...]
    transfer: float
    span: float
    outside: tuple[float, float, float]

    @property
    def seconds(self) -> float:
        return self.span + sum(self.outside)


def best_pipeline(work: MixedWorkload) -> MixedChoice | None:
    """The best pipeline through all groups; None where none fits or the framework has no pipeline."""
    best: PipelineCut | None = None
    enough: set[Layout] = set()  # layouts, apart from recompute, that need no more of it
    for layout, counts in _layouts(work):
        plain = replace(layout, recompute="none")
        if plain in enough:
            continue
        blocks = [_blocks(work, group, layout) for group in work.mixed.groups]
        for order in permutations(range(len(blocks))):
            stages = tuple(blocks[g] for g in order for _ in range(counts[g]))
            floor = _floor(stages)
            if best is not None and floor >= best.seconds:
                enough.add(plain)
                continue
            cut = _best_cut(layout, stages)
            if cut is not None:
                enough.add(plain)
                best = cut if best is None or cut.seconds < best.seconds else best
    return None if best is None else _choice(work, best)


def _layouts(work: MixedWorkload) -> Iterator[tuple[Layout, tuple[int, ...]]]:
    """Layouts of all groups, with the number of stages of each; tp and dp are the same on all."""
    groups, pins, facts = work.mixed.groups, work.request.pins, work.workload.facts
    batch, count = work.request.global_batch, len(work.workload.card.blocks)
    sizes = facts.tensor_parallel_sizes(min(group.devices_per_node for group in groups), work.workload.framework)
    for tp in [pins["tp"]] if "tp" in pins else sizes:
        for dp in [pins["dp"]] if "dp" in pins else divisors(min(group.devices for group in groups)):
            if min(tp, dp) < 1 or batch % dp or any(group.devices % (tp * dp) for group in groups):
                continue
            stages = tuple(group.devices // (tp * dp) for group in groups)
            if sum(stages) > count or pins.get("pp", sum(stages)) != sum(stages):
                continue
            sequence = pins.get("sequence_parallel", tp > 1 and facts.units_per_sample % tp == 0)
            shards = [pins["shard"]] if "shard" in pins else sorted({1, dp})
            for micro in [pins["micro_batch"]] if "micro_batch" in pins else divisors(batch // dp):
                plain = "1f1b" if batch // dp // micro >= sum(stages) else "gpipe"  # gpipe only needs more memory
                for schedule in [pins["schedule"]] if "schedule" in pins else [plain]:
                    for shard in shards:
                        for recompute in work.space(groups[0], batch, pins).recomputes():
                            layout = Layout(
                                dp=dp, shard=shard, tp=tp, pp=sum(stages), sequence_parallel=sequence,
                                micro_batch=micro, schedule=schedule, recompute=recompute,
                                **{name: pins[name] for name in ("cp", "ep", "vpp", "offload") if name in pins},
                            )  # fmt: skip
                            simple = layout.schedule in ("1f1b", "gpipe") and layout.cp * layout.ep * layout.vpp == 1
                            if simple and allowed(work.workload.query(layout)):
                                yield layout, stages


def _blocks(work: MixedWorkload, group: Cluster, layout: Layout) -> BlockEstimates:
    """The estimate of each block, from a pipeline of single blocks on this group's devices."""
    estimator, count = work.estimator(group), len(work.workload.card.blocks)
    single = estimator.estimate(replace(layout, pp=count, schedule="gpipe"))
    whole = estimator.estimate(layout)
    return BlockEstimates(
        group, single.forward_seconds, single.backward_seconds, single.memory, single.transfer_seconds,
        single.micro_batches,
        (whole.per_step.waits, whole.optimizer_seconds, whole.other_seconds),
    )  # fmt: skip


def _floor(stages: Sequence[BlockEstimates]) -> float:
    """A lower bound of the pipeline's seconds: all work divided among the stages by their speed."""
    rate = sum(1 / stage.total for stage in stages)
    return stages[0].micro_batches / rate


def _best_cut(layout: Layout, stages: tuple[BlockEstimates, ...]) -> PipelineCut | None:
    """Of the cuts that fit, the one whose slowest stage is quickest, by bisection; None where none fits."""
    total = max(stage.total for stage in stages)
    best = _cut(layout, stages, total)
    if best is None:
        return None
    low, high = 0.0, total
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        cut = _cut(layout, stages, middle)
        if cut is None:
            low = middle
        else:
            best, high = cut, middle
    edges = list(zip(best, (*best[1:], len(stages[0].forward)), strict=True))
    forward = tuple(sum(s.forward[a:b]) for s, (a, b) in zip(stages, edges, strict=True))
    backward = tuple(sum(s.backward[a:b]) for s, (a, b) in zip(stages, edges, strict=True))
    transfer = max(stage.transfer for stage in stages)
    memory = tuple(
        stage.stage(a, b, _in_flight(layout, place, stage.micro_batches))
        for place, (stage, (a, b)) in enumerate(zip(stages, edges, strict=True))
    )
    span = span_seconds(layout.schedule, stages[0].micro_batches, forward, backward, transfer)
    outside = max((stage.outside for stage in stages), key=sum)
    return PipelineCut(layout, stages, best, forward, backward, memory, transfer, span, outside)


def _in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    return micro_batches if layout.schedule == "gpipe" else min(layout.pp - stage, micro_batches)


def _cut(layout: Layout, stages: tuple[BlockEstimates, ...], cap: float) -> tuple[int, ...] | None:
    """First blocks of stages that fit and take at most `cap` seconds each, every stage as full as it can be; None where
    blocks are left over."""
    firsts, start, count = [], 0, len(stages[0].forward)
    for place, stage in enumerate(stages):
        firsts.append(start)
        fits = stage.limit(start, _in_flight(layout, place, stage.micro_batches))
        most = min(fits, count - (len(stages) - place - 1))
        stop, cost = start, 0.0
        while stop < most and cost + stage.cost(stop) <= cap:
            cost += stage.cost(stop)
            stop += 1
        if stop == start:
            return None
        start = stop
    return tuple(firsts) if start == count else None


def _choice(work: MixedWorkload, cut: PipelineCut) -> MixedChoice:
    layout = cut.layout
    busiest = max(range(layout.pp), key=lambda s: cut.forward[s] + cut.backward[s])
    micro_batches = cut.blocks[0].micro_batches
    busy = micro_batches * (cut.forward[busiest] + cut.backward[busiest])
    estimator = work.estimator(cut.blocks[busiest].group)
    waits, update, host = cut.outside
    whole = replace(
        estimator.estimate(layout),
        first_blocks=cut.firsts,
        forward_seconds=cut.forward,
        backward_seconds=cut.backward,
        transfer_seconds=cut.transfer,
        compute_seconds=busy,
        communication_seconds=waits,
        bubble_seconds=cut.span - busy,
        launch_seconds=0.0,
        optimizer_seconds=update,
        other_seconds=host,
        per_step=PerStepCost(),
        weight_seconds=(),
        boundary_seconds=(),
        pipeline_overlap=True,
        step_seconds=cut.seconds,
        memory=cut.memory,
    )
    forecast = work.forecast(cut.seconds)
    choice = choice_of(whole, None, work.estimator(work.mixed.slowest), work.request, 1, forecast)
    shares = _shares(work, cut)
    why = "; ".join(f"{s.group} has {s.stages}: {s.why}" for s in shares)
    predicted = choice.predicted.with_figures(mfu=mfu(work, cut.seconds))
    return MixedChoice("stages", replace(choice, predicted=predicted, why=why), shares)


def _shares(work: MixedWorkload, cut: PipelineCut) -> tuple[Share, ...]:
    edges = (*cut.firsts, len(work.workload.card.blocks))
    shares = []
    for group in work.mixed.groups:
        mine = [place for place, stage in enumerate(cut.blocks) if stage.group is group]
        blocks = edges[mine[-1] + 1] - edges[mine[0]]
        each = [cut.forward[s] + cut.backward[s] for s in mine]
        why = f"{blocks} of {edges[-1]} blocks for {group.devices / work.mixed.devices:.0%} of the devices, "
        why += f"{max(each):.3g} s a micro-batch"
        shares.append(
            Share(
                group=group.device.name,
                devices=group.devices,
                first_stage=mine[0],
                stop_stage=mine[-1] + 1,
                samples=work.request.global_batch,
                micro_batch=cut.layout.micro_batch,
                peak_bytes=max(cut.memory[s].total for s in mine),
                why=why,
            )
        )
    return tuple(shares)
