"""Seconds and bytes of a layout: joins the costs of blocks, schedule, work per step and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from meshwright.layout import Layout
from meshwright.plan.constants import Profile, default_profile
from meshwright.plan.cost.block_memory import ELEMENT_BYTES
from meshwright.plan.cost.block_time import BlockCost, BlockTimes, block_key
from meshwright.plan.cost.memory import BlockCounts, MemoryModel, StageMemory
from meshwright.plan.cost.per_step import PerStepCost, PerStepTimes
from meshwright.plan.pipeline import TABLE, balance_costs, span_seconds
from meshwright.plan.pipeline.actions import stage_ranks
from meshwright.plan.pipeline.length import least_span, replayed_seconds
from meshwright.plan.workload import Workload


@dataclass(frozen=True)
class Estimate:
    """The prediction for one Layout, in parts. Tuples have one entry per virtual stage, in seconds of one micro-batch;
    `breakdown` adds up to the step."""

    layout: Layout
    micro_batches: int
    first_blocks: tuple[int, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    weight_seconds: tuple[float, ...]  # the part of the backward that computes weight gradients
    transfer_seconds: float  # of the slowest transfer between stages
    compute_seconds: float  # arithmetic of the slowest rank, per step
    launch_seconds: float  # added to it by the host, which starts the operations
    communication_seconds: float  # waits for collectives on the slowest rank, per step
    bubble_seconds: float
    optimizer_seconds: float
    other_seconds: float  # of the host per step, with the reading of the batch
    step_seconds: float
    memory: tuple[StageMemory, ...]
    per_step: PerStepCost = field(default_factory=PerStepCost)
    boundary_seconds: tuple[float, ...] = ()  # of the transfer over each boundary between virtual stages
    pipeline_overlap: bool = True
    compiled: bool = False

    @property
    def peak_bytes(self) -> int:
        return max(stage.total for stage in self.memory)

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds by cause; their sum is the step."""
        return {
            "compute": self.compute_seconds,
            "launch": self.launch_seconds,
            "communication": self.communication_seconds - self.per_step.waits,
            "bubble": self.bubble_seconds,
            "gradients": self.per_step.gradients,
            "weights": self.per_step.weights,
            "optimizer": self.optimizer_seconds,
            "other": self.other_seconds,
        }


class Estimator:
    """Estimates layouts of one workload; equal blocks are computed once, and what layouts share is cached."""

    def __init__(self, workload: Workload, profile: Profile | None = None) -> None:
        self.workload, self.memory = workload, MemoryModel(workload)
        self._kinds, self._kind_of_block = workload.card.kinds
        self._set_profile(default_profile() if profile is None else profile)

    def with_profile(self, profile: Profile) -> Estimator:
        """This estimator with other constants. It shares the memory model: fits ask for thousands."""
        return self._changed(self.workload, profile)

    def _changed(self, workload: Workload, profile: Profile) -> Estimator:
        other = copy(self)
        other.__dict__.pop("compiled", None)
        other.workload = workload
        other._set_profile(profile)
        return other

    def _set_profile(self, profile: Profile) -> None:
        self.profile = profile
        self.blocks = BlockTimes(self.workload, self.profile, self.memory.blocks)
        self.per_step = PerStepTimes(self.blocks)
        self._gpu = self.workload.cluster.device.kind != "cpu"
        self._sharpness = (self.profile["cuda.host.sharpness"], self.profile["cuda.host.tied_sharpness"])
        self._costs: dict[tuple[object, ...], tuple[BlockCost, ...]] = {}
        self._cuts: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._stages: dict[tuple[object, ...], _StageCosts] = {}
        self._boundaries: dict[tuple[object, ...], tuple[float, ...]] = {}

    def estimate(self, layout: Layout, *, exact: bool = False) -> Estimate:
        """Seconds and bytes of a layout that no rule refuses; `exact` replays the schedule action by action.

        Raises ValueError where the schedule cannot run the layout's number of micro-batches."""
        m, stages = layout.micro_batches(self.workload.global_batch), self._stage_costs(layout)
        transfer = self._transfers(layout)
        length = self._pipeline_seconds(layout, m, stages, transfer, replayed_seconds if exact else span_seconds)
        slowest = stages.slowest
        busy, wait, device = (m * part[slowest] for part in (stages.busy, stages.wait, stages.device))
        compute = min(device, busy) - wait
        per_step = self.per_step.seconds(layout, stages.elements, stages.last_backward, m, stages.experts)
        optimizer, other = self._optimizer_seconds(layout, stages), self._host_seconds(layout)
        return Estimate(
            layout=layout,
            micro_batches=m,
            first_blocks=stages.cut,
            forward_seconds=stages.forward,
            backward_seconds=stages.backward,
            weight_seconds=stages.weight,
            transfer_seconds=max(transfer, default=0.0),
            boundary_seconds=transfer,
            compute_seconds=compute,
            launch_seconds=busy - wait - compute,
            communication_seconds=wait + per_step.waits,
            bubble_seconds=length - busy,
            optimizer_seconds=optimizer,
            other_seconds=other,
            step_seconds=length + per_step.waits + optimizer + other,
            memory=self.memory.stages(layout, stages.cut, m),
            per_step=per_step,
            pipeline_overlap=self.workload.framework.pipeline_overlap,
            compiled=self.workload.framework.fused == "compiled",
        )

    @cached_property
    def compiled(self) -> Estimator:
        """This estimator with compiled blocks: fewer memory-bound passes, and fewer operations to start."""
        framework = replace(self.workload.framework, fused="compiled")
        return self._changed(replace(self.workload, framework=framework), self.profile)

    def peak_bytes(self, layout: Layout) -> int:
        """Bytes on the fullest rank, as in `estimate`."""
        stages = self.memory.stages(layout, self.stages(layout), layout.micro_batches(self.workload.global_batch))
        return max(stage.total for stage in stages)

    def least_bytes(self, layout: Layout) -> int:
        """A lower bound of the bytes on the fullest rank, also with larger micro-batches or a smaller shard."""
        return self.memory.least_bytes(layout, self.stages(layout), layout.micro_batches(self.workload.global_batch))

    def least_seconds(self, layout: Layout) -> float:
        """A lower bound of the step's seconds, near `estimate`'s, without replaying the schedule."""
        m, stages = layout.micro_batches(self.workload.global_batch), self._stage_costs(layout)
        length = self._pipeline_seconds(layout, m, stages, self._transfers(layout), least_span)
        per_step = self.per_step.seconds(layout, stages.elements, stages.last_backward, m, stages.experts)
        return length + per_step.waits + (self._optimizer_seconds(layout, stages) + self._host_seconds(layout))

    def _host_seconds(self, layout: Layout) -> float:
        """Seconds of the host per step: its own work, and reading a rank's share of the batch."""
        samples = self.workload.global_batch // layout.dp
        return self.per_step.host_seconds + self.per_step.reading_seconds(samples)

    def _optimizer_seconds(self, layout: Layout, stages: _StageCosts) -> float:
        """Seconds of the optimizer on the rank with the most to do."""
        ranks = set(zip(stages.elements, stages.experts, strict=True))
        return max(self.per_step.update(layout, elements, experts) for elements, experts in ranks)

    def stages(self, layout: Layout) -> tuple[int, ...]:
        """Index of each virtual stage's first block: balanced by cost, or by layers if the framework cuts so."""
        count = layout.pp * layout.vpp
        if count == 1:
            return (0,)
        key = (*block_key(layout), count)
        if key not in self._cuts:
            layers = len(self.workload.card.blocks) - 2
            cut = None if self.workload.framework.head_balanced else equal_layers(layers, count)
            if cut is None:
                costs, tied = self._block_costs(layout), layout.tp > 1
                seconds = [sum(self._stage(costs, ((kind, 1),), tied)[:2]) for kind in range(len(costs))]
                cut = balance_costs([seconds[kind] for kind in self._kind_of_block], count)
            self._cuts[key] = cut
        return self._cuts[key]

    def _stage_costs(self, layout: Layout) -> _StageCosts:
        key = (*block_key(layout), layout.pp, layout.vpp, layout.schedule)
        stages = self._stages.get(key)
        if stages is None:
            stages = self._stages[key] = self._new_stage_costs(layout)
        return stages

    def _new_stage_costs(self, layout: Layout) -> _StageCosts:
        cut, tied, costs = self.stages(layout), layout.tp > 1, self._block_costs(layout)
        parameters = [self.blocks.local_parameters(layout, block) for block, _ in self._kinds]
        by_counts: dict[BlockCounts, tuple[float, ...]] = {}
        rows = []
        for counts in self.memory.counted(cut):
            if counts not in by_counts:
                expert, dense = (sum(count * parameters[kind][i] for kind, count in counts) for i in (0, 1))
                by_counts[counts] = (*self._stage(costs, counts, tied), expert + dense, expert)
            rows.append(by_counts[counts])
        forward, backward, weight, *_ = zip(*rows, strict=True)
        ranks = stage_ranks(layout.schedule, layout.pp, layout.vpp) if layout.pp > 1 else (0,) * len(rows)
        by_rank = [[0.0] * 6 for _ in range(layout.pp)]
        for row, rank in zip(rows, ranks, strict=True):
            sums = by_rank[rank]
            for place, value in enumerate((row[0] + row[1], row[3], row[4], row[1], row[5], row[6])):
                sums[place] += value
        busy, wait, device, last, elements, experts = zip(*by_rank, strict=True)
        slowest = max(range(layout.pp), key=busy.__getitem__)
        return _StageCosts(cut, forward, backward, weight, busy, wait, device, elements, slowest, last[0], experts)

    def _stage(self, costs: Sequence[BlockCost], counts: BlockCounts, tied: bool) -> tuple[float, ...]:
        """Seconds of one micro-batch through a stage with `counts` blocks of each kind: forward, backward, the part of
        the backward that computes weight gradients, waits, and the device's own."""
        f = b = w = wait = hf = hb = 0.0
        for kind, count in counts:
            cost = costs[kind]
            f, b, w = f + count * cost.forward, b + count * cost.backward, w + count * cost.weight
            wait += count * (cost.forward_wait + cost.backward_wait)
            hf, hb = hf + count * cost.host_forward, hb + count * cost.host_backward
        ahead, back = self._joined(f, hf, tied), self._joined(b, hb, tied)
        share = self._joined(f + b, hf + hb, tied) / (ahead + back) if ahead + back else 0.0
        return ahead * share, back * share, min(w, back * share), wait, f + b

    def _joined(self, device: float, host: float, tied: bool) -> float:
        """Seconds of a stage whose device and host work side by side: a little more than the larger of the two. Hosts
        `tied` by the collectives of every layer all wait for the latest."""
        if host <= 0.0 or device <= 0.0 or not self._gpu:  # on a CPU the same core does both
            return device + host
        high, low = (device, host) if device > host else (host, device)
        sharpness = self._sharpness[tied]
        return high * (1 + (low / high) ** sharpness) ** (1 / sharpness)

    def _pipeline_seconds(
        self, layout: Layout, m: int, stages: _StageCosts, transfer: Sequence[float], span: Callable[..., float]
    ) -> float:
        """Seconds of `m` micro-batches through the pipeline; `span` has the arguments of `span_seconds`."""
        if layout.pp == 1 and layout.vpp == 1:
            return m * (stages.forward[0] + stages.backward[0])
        return span(
            layout.schedule,
            m,
            stages.forward,
            stages.backward,
            transfer,
            vpp=layout.vpp,
            weight_seconds=stages.weight if TABLE[layout.schedule].splits else None,
            overlapped=self.workload.framework.pipeline_overlap,
        )

    def _block_costs(self, layout: Layout) -> tuple[BlockCost, ...]:
        """Costs by kind of block."""
        key = block_key(layout)
        if key not in self._costs:
            self._costs[key] = tuple(self.blocks.cost(layout, block, inputs) for block, inputs in self._kinds)
        return self._costs[key]

    def _transfers(self, layout: Layout) -> tuple[float, ...]:
        degrees = (layout.pp, layout.vpp, layout.tp, layout.cp, layout.dp)
        key = (*degrees, layout.micro_batch, layout.schedule, layout.sequence_parallel)
        transfers = self._boundaries.get(key)
        if transfers is None:
            transfers = self._boundaries[key] = self._new_transfers(layout)
        return transfers

    def _new_transfers(self, layout: Layout) -> tuple[float, ...]:
        """Seconds to pass a micro-batch's activations over each boundary between virtual stages."""
        count = layout.pp * layout.vpp
        if count == 1:
            return ()
        if layout.pp == 1:
            return (0.0,) * (count - 1)
        elements, scatters = self.workload.card.blocks[0].output_elements, self.workload.framework.scatters_transfers
        size = elements * layout.micro_batch * ELEMENT_BYTES[self.workload.precision] / layout.cp
        network, gather = self.blocks.network, 0.0
        if layout.tp > 1 and scatters and not layout.sequence_parallel:
            gather = network.all_gather(size, network.group(layout.tp, 1))
        size /= layout.tp if layout.sequence_parallel or scatters else 1
        apart = layout.devices // layout.pp
        inside = max(1, self.workload.cluster.domain // apart)  # stages that one inner link joins
        near, far = (gather + network.point_to_point(size, far=far) for far in (False, True))
        islands = [rank // inside for rank in stage_ranks(layout.schedule, layout.pp, layout.vpp)]
        return tuple(near if a == b else far for a, b in pairwise(islands))


@dataclass(frozen=True)
class _StageCosts:
    """Seconds of one micro-batch: per virtual stage `forward`, `backward` and `weight`; per rank `busy` (host and
    device), the waits in it, and the device's own. Elements of parameters are per rank, `experts` a part of them."""

    cut: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    busy: tuple[float, ...]
    wait: tuple[float, ...]
    device: tuple[float, ...]
    elements: tuple[float, ...]
    slowest: int
    last_backward: float  # of the first rank, which ends last
    experts: tuple[float, ...]


def equal_layers(layers: int, stages: int) -> tuple[int, ...] | None:
    """First block of each stage, with equal layers per stage: the embedding on the first stage and the head on the last
    are extra, or count as layers where only that divides. None where neither divides."""
    if layers > 0 and layers % stages == 0:
        each = layers // stages
        return (0, *(1 + each * stage for stage in range(1, stages)))
    if layers > 0 and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return tuple(each * stage for stage in range(stages))
    return None
