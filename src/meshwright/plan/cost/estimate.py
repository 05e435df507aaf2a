"""What a Layout would take: joins blocks, schedule, once-a-step work and memory into seconds and bytes per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

from meshwright.card import Block
from meshwright.layout import Layout
from meshwright.plan.constants import Profile, default_profile
from meshwright.plan.cost.block_time import BlockCost, BlockTimes, block_key
from meshwright.plan.cost.gpu import BYTES, local_elements
from meshwright.plan.cost.memory import BlockCounts, MemoryModel, StageMemory
from meshwright.plan.cost.per_step import PerStepCost, PerStepTimes
from meshwright.plan.pipeline import TABLE, balance_costs, span_seconds
from meshwright.plan.pipeline.actions import places
from meshwright.plan.pipeline.length import least_span, replayed_seconds
from meshwright.plan.workload import Workload


@dataclass(frozen=True)
class Estimate:
    """The prediction for one Layout, in parts. Stage tuples have one entry a virtual stage, seconds of one
    micro-batch; `breakdown` adds up to the step."""

    layout: Layout
    micro_batches: int
    first_blocks: tuple[int, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    weight_seconds: tuple[float, ...]  # the part of the backward that computes weights' gradients
    transfer_seconds: float  # to another stage, the slowest of them
    compute_seconds: float  # arithmetic of the slowest rank, whole step
    launch_seconds: float  # what the host's starting of operations adds to it
    communication_seconds: float  # waiting for collectives, whole step, slowest rank
    bubble_seconds: float
    optimizer_seconds: float
    other_seconds: float  # of the host once a step, reading the batch included
    step_seconds: float
    memory: tuple[StageMemory, ...]
    per_step: PerStepCost = field(default_factory=PerStepCost)
    boundary_seconds: tuple[float, ...] = ()  # transfers over each boundary between virtual stages
    pipeline_overlap: bool = True
    compiled: bool = False

    @property
    def peak_bytes(self) -> int:
        return max(stage.total for stage in self.memory)

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds by what they go to; their sum is the step."""
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
    """Estimates layouts of one workload; equal blocks are computed once, shared parts remembered."""

    def __init__(self, workload: Workload, profile: Profile | None = None) -> None:
        self.workload, self.memory = workload, MemoryModel(workload)
        self._take(default_profile() if profile is None else profile)

    def with_profile(self, profile: Profile) -> Estimator:
        """The same questions answered by other constants. What does not depend on them, memory and the kinds of blocks,
        is shared with this one: fits ask for thousands."""
        other = copy(self)
        other.__dict__.pop("compiled", None)
        other._take(profile)
        return other

    def _take(self, profile: Profile) -> None:
        self.profile = profile
        self.blocks = BlockTimes(self.workload, self.profile, self.memory.blocks)
        self.per_step = PerStepTimes(self.blocks)
        self._gpu = self.workload.cluster.device.kind != "cpu"
        self._sharpness = (self.profile["cuda.host.sharpness"], self.profile["cuda.host.tied_sharpness"])
        self._costs: dict[tuple[object, ...], tuple[BlockCost, ...]] = {}
        self._elements: dict[tuple[int, int], list[int]] = {}
        self._shares: dict[tuple[int, int], list[int]] = {}
        self._cuts: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._stages: dict[tuple[object, ...], _Stages] = {}
        self._transferred: dict[tuple[object, ...], tuple[float, ...]] = {}

    @cached_property
    def _kinds(self) -> tuple[list[tuple[Block, int]], list[int]]:
        return self.workload.card.kinds

    def estimate(self, layout: Layout, *, exact: bool = False) -> Estimate:
        """Seconds and bytes of a layout that no rule refuses; `exact` replays the schedule instead of its formula.

        Raises ValueError where the schedule cannot run so many micro-batches."""
        m, stages = layout.micro_batches(self.workload.global_batch), self._stages_of(layout)
        transfer = self._transfers_of(layout)
        length = self._length(layout, m, stages, transfer, replayed_seconds if exact else span_seconds)
        slowest = stages.slowest
        busy, wait, device = (m * part[slowest] for part in (stages.busy, stages.wait, stages.device))
        compute = min(device, busy) - wait
        last = stages.last_backward
        once = self.per_step.seconds(layout, stages.elements, last, m, stages.experts)
        optimizer = self._update(layout, stages)
        other = self._host(layout)
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
            communication_seconds=wait + once.waits,
            bubble_seconds=length - busy,
            optimizer_seconds=optimizer,
            other_seconds=other,
            step_seconds=length + once.waits + optimizer + other,
            memory=self.memory.stages(layout, stages.cut, m),
            per_step=once,
            pipeline_overlap=self.workload.framework.pipeline_overlap,
            compiled=self.workload.framework.fused == "compiled",
        )

    @cached_property
    def compiled(self) -> Estimator:
        """The same questions where blocks are compiled: fewer memory-bound passes, fewer operations to start."""
        other = copy(self)
        other.__dict__.pop("compiled", None)
        other.workload = replace(self.workload, framework=replace(self.workload.framework, fused="compiled"))
        other._take(self.profile)
        return other

    def peak_bytes(self, layout: Layout) -> int:
        """Bytes on the fullest rank, as `estimate` says it, without its seconds."""
        stages = self.memory.stages(layout, self.stages(layout), layout.micro_batches(self.workload.global_batch))
        return max(stage.total for stage in stages)

    def least_bytes(self, layout: Layout) -> int:
        """Bytes on the fullest rank at least, with larger micro-batches or a smaller shard too."""
        return self.memory.least_bytes(layout, self.stages(layout), layout.micro_batches(self.workload.global_batch))

    def least_seconds(self, layout: Layout) -> float:
        """Seconds that the step takes at least: as `estimate` says, or a little less, without walking the schedule."""
        m, stages = layout.micro_batches(self.workload.global_batch), self._stages_of(layout)
        length = self._length(layout, m, stages, self._transfers_of(layout), least_span)
        once = self.per_step.seconds(layout, stages.elements, stages.last_backward, m, stages.experts)
        return length + once.waits + self._apart(layout, stages)

    def _apart(self, layout: Layout, stages: _Stages) -> float:
        """Seconds of a step beside its micro-batches and what waits for other ranks."""
        return self._update(layout, stages) + self._host(layout)

    def _host(self, layout: Layout) -> float:
        """Seconds of the host once a step: its own work, and reading a rank's share of the batch."""
        samples = self.workload.global_batch // layout.dp
        return self.per_step.host_seconds + self.per_step.reading_seconds(samples)

    def _update(self, layout: Layout, stages: _Stages) -> float:
        """Seconds of the optimizer, on the rank with the most to do."""
        held = set(zip(stages.elements, stages.experts, strict=True))
        return max(self.per_step.update(layout, elements, experts) for elements, experts in held)

    def stages(self, layout: Layout) -> tuple[int, ...]:
        """Index of each virtual stage's first block: the slowest stage as quick as can be, or as the framework cuts."""
        count = layout.pp * layout.vpp
        if count == 1:
            return (0,)
        key = (*block_key(layout), count)
        if key not in self._cuts:
            layers = len(self.workload.card.blocks) - 2
            even = None if self.workload.framework.head_balanced else equal_layers(layers, count)
            if even is None:
                whole = [
                    self._stage(self._block_costs(layout), self._local_elements(layout), ((kind, 1),), layout.tp > 1)
                    for kind in range(len(self._kinds[0]))
                ]
                even = balance_costs([whole[kind][0] + whole[kind][1] for kind in self._kinds[1]], count)
            self._cuts[key] = even
        return self._cuts[key]

    def _stages_of(self, layout: Layout) -> _Stages:
        key = (*block_key(layout), layout.pp, layout.vpp, layout.schedule)
        found = self._stages.get(key)
        if found is None:
            found = self._stages[key] = self._new_stages(layout)
        return found

    def _new_stages(self, layout: Layout) -> _Stages:
        cut, tied = self.stages(layout), layout.tp > 1
        costs, sizes = self._block_costs(layout), self._local_elements(layout)
        shares = self._expert_elements(layout)
        known: dict[BlockCounts, tuple[float, ...]] = {}
        rows = []
        for counted in self.memory.counted(cut):
            if counted not in known:
                held = sum(count * shares[kind] for kind, count in counted)
                known[counted] = (*self._stage(costs, sizes, counted, tied), held)
            rows.append(known[counted])
        forward, backward, weight, *_ = zip(*rows, strict=True)
        home = places(layout.schedule, layout.pp, layout.vpp) if layout.pp > 1 else (0,) * len(rows)
        by_rank = [[0.0] * 6 for _ in range(layout.pp)]
        for row, rank in zip(rows, home, strict=True):
            mine = by_rank[rank]
            for place, value in enumerate((row[0] + row[1], row[3], row[4], row[5], row[1], row[6])):
                mine[place] += value
        busy, wait, device, elements, last, experts = zip(*by_rank, strict=True)
        slowest = max(range(layout.pp), key=busy.__getitem__)
        return _Stages(cut, forward, backward, weight, busy, wait, device, elements, slowest, last[0], experts)

    def _stage(
        self, costs: Sequence[BlockCost], sizes: Sequence[float], counted: BlockCounts, tied: bool
    ) -> tuple[float, ...]:
        """Forward, backward and the weights' part of it, waits, the device's own seconds, parameters: of one
        micro-batch through a stage of so many blocks of each kind."""
        f = b = w = wait = hf = hb = held = 0.0
        for kind, count in counted:
            cost = costs[kind]
            f, b, w = f + count * cost.forward, b + count * cost.backward, w + count * cost.weight
            wait += count * (cost.forward_wait + cost.backward_wait)
            hf, hb = hf + count * cost.host_forward, hb + count * cost.host_backward
            held += count * sizes[kind]
        ahead, back = self._joined(f, hf, tied), self._joined(b, hb, tied)
        share = self._joined(f + b, hf + hb, tied) / (ahead + back) if ahead + back else 0.0
        return ahead * share, back * share, min(w, back * share), wait, f + b, held

    def _joined(self, device: float, host: float, tied: bool) -> float:
        """Seconds of a stage whose device and host work side by side: nearly the larger, since one runs ahead of the
        other only as far as it can. Hosts `tied` by the collectives of every layer all wait for the latest."""
        if host <= 0.0 or device <= 0.0 or not self._gpu:  # on a CPU the same core does both
            return device + host
        high, low = (device, host) if device > host else (host, device)
        sharpness = self._sharpness[tied]
        return high * (1 + (low / high) ** sharpness) ** (1 / sharpness)

    def _length(
        self, layout: Layout, m: int, stages: _Stages, transfer: Sequence[float], how: Callable[..., float]
    ) -> float:
        """Seconds of all micro-batches through the pipeline, as `how` counts them."""
        if layout.pp == 1 and layout.vpp == 1:
            return m * (stages.forward[0] + stages.backward[0])
        return how(
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
            self._costs[key] = tuple(self.blocks.cost(layout, block, given) for block, given in self._kinds[0])
        return self._costs[key]

    def _local_elements(self, layout: Layout) -> list[int]:
        """Parameters of each kind of block that one rank of `tp` and `ep` holds."""
        key = (layout.tp, layout.ep)
        if key not in self._elements:
            self._elements[key] = [local_elements(block.parameters, *key) for block, _ in self._kinds[0]]
        return self._elements[key]

    def _expert_elements(self, layout: Layout) -> list[int]:
        """Of `_local_elements`, those of experts."""
        key = (layout.tp, layout.ep)
        if key not in self._shares:
            own = ([p for p in block.parameters if "expert" in p.axes] for block, _ in self._kinds[0])
            self._shares[key] = [local_elements(parameters, *key) for parameters in own]
        return self._shares[key]

    def _transfers_of(self, layout: Layout) -> tuple[float, ...]:
        degrees = (layout.pp, layout.vpp, layout.tp, layout.cp, layout.dp)
        key = (*degrees, layout.micro_batch, layout.schedule, layout.sequence_parallel)
        found = self._transferred.get(key)
        if found is None:
            found = self._transferred[key] = self._transfers(layout)
        return found

    def _transfers(self, layout: Layout) -> tuple[float, ...]:
        """Handing a micro-batch's activations over each boundary between virtual stages."""
        count = layout.pp * layout.vpp
        if count == 1:
            return ()
        if layout.pp == 1:
            return (0.0,) * (count - 1)
        size = (
            self.workload.card.blocks[0].output_elements
            * layout.micro_batch
            * BYTES[self.workload.precision]
            / layout.cp
        )
        network, gather = self.blocks.network, 0.0
        if layout.tp > 1 and self.workload.framework.scatters_transfers and not layout.sequence_parallel:
            gather = network.all_gather(size, network.group(layout.tp, 1))
        size /= layout.tp if layout.sequence_parallel or self.workload.framework.scatters_transfers else 1
        apart = layout.devices // layout.pp
        inside = max(1, self.workload.cluster.domain // apart)  # stages that one inner link joins
        near, far = (gather + network.point_to_point(size, far=far) for far in (False, True))
        home = places(layout.schedule, layout.pp, layout.vpp)
        return tuple(near if home[i] // inside == home[i + 1] // inside else far for i in range(count - 1))


@dataclass(frozen=True)
class _Stages:
    """Seconds of one micro-batch by virtual stage, and by rank: busy with host and device, of it waits, the device's
    own, parameters held; and the rank that is busiest."""

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
    experts: tuple[float, ...]  # of the parameters held, those of experts


def equal_layers(layers: int, stages: int) -> tuple[int, ...] | None:
    """First blocks where every stage has as many layers, the embedding with the first and the head with the last; or,
    where only that divides, the two counted as layers. None where neither does."""
    if layers > 0 and layers % stages == 0:
        each = layers // stages
        return (0, *(1 + each * stage for stage in range(1, stages)))
    if layers > 0 and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return tuple(each * stage for stage in range(stages))
    return None
