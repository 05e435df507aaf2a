"""Seconds of the work that is done once per step: reducing gradients, gathering weights, the optimizer, the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.layout import Layout
from meshwright.plan.cost.block_time import BlockTimes
from meshwright.plan.cost.cpu import CpuCompute
from meshwright.plan.pipeline import TABLE
from meshwright.plan.rules.frameworks import weights_stay_gathered


@dataclass(frozen=True)
class PerStepCost:
    """Seconds of waiting per step for the reduction of gradients and the gathering of weights, after overlap."""

    gradients: float = 0.0
    weights: float = 0.0

    @property
    def waits(self) -> float:
        return self.gradients + self.weights


class PerStepTimes:
    """Work per step of one workload."""

    def __init__(self, blocks: BlockTimes) -> None:
        card, self.constants = blocks.workload.card, blocks.profile.constants
        self.blocks, self.network, self.framework = blocks, blocks.network, blocks.framework
        self.on_cpu = blocks.workload.cluster.device.kind == "cpu"
        self.units = card.units_per_sample
        tied = {first for first, _ in card.tied}
        self.tied = sum(p.elements for p in card.parameters if p.name in tied)
        self.host_seconds = 0.0 if self.on_cpu else self.constants["cuda.step_seconds"]
        self._collectives: dict[tuple[object, ...], PerStepCost] = {}
        self._norms: dict[int, float] = {}

    def reading_seconds(self, samples: int) -> float:
        """To read `samples` and put them on the device; zero where other processes read ahead."""
        if self.framework.reads_ahead:
            return 0.0
        kind = "cpu" if self.on_cpu else "cuda"
        return samples * self.units * self.constants[f"{kind}.data.unit_seconds"]

    def seconds(
        self,
        layout: Layout,
        elements: Sequence[float],
        last_backward: float,
        micro_batches: int,
        experts: Sequence[float] = (0.0,),
    ) -> PerStepCost:
        """Waits of a step whose ranks hold `elements` of parameters, `experts` of which are experts', and whose last
        backward takes `last_backward` seconds. Gradients of experts are summed over the ranks with the same experts.

        Without overlap every stage reduces once the pipeline has drained, and the largest decides. With overlap the
        first stage, which ends last, hides the reduction behind its last backward, or, if stages are interleaved,
        behind those of `pp` micro-batches, whose chunks end one after another. Gathering updated weights hides behind
        the first forwards likewise.
        """
        overlap = 0.0 if self.on_cpu else self.blocks.overlap
        share, gather_share = self.framework.gradient_overlap * overlap, self.framework.gather_overlap * overlap
        window = last_backward * (min(layout.pp, micro_batches) if layout.vpp > 1 else 1)
        first = bool(share) and layout.pp > 1
        own, own_experts = (ranks[0] if first else max(ranks) for ranks in (elements, experts))
        collectives = self._parameter_collectives(layout, own, own_experts if layout.ep > 1 else 0.0)
        reduce = max(0.0, collectives.gradients - share * window)
        gather = max(0.0, collectives.weights - gather_share * window / 2)  # a forward takes half of a backward
        if self.tied and layout.pp > 1 and not TABLE[layout.schedule].folded:  # a V has both ends on one rank
            size = self.tied * self.blocks.gradient_bytes / layout.tp
            reduce += self.network.all_reduce(size, self.network.group(2, layout.devices // 2))
        return PerStepCost(reduce + self._norm(layout.devices), gather)

    def _norm(self, devices: int) -> float:
        """Summing the gradient's norm over all ranks, for clipping."""
        if devices not in self._norms:
            self._norms[devices] = self.network.all_reduce(8, self.network.group(devices, 1))
        return self._norms[devices]

    def _parameter_collectives(self, layout: Layout, elements: float, experts: float) -> PerStepCost:
        """Seconds of the reduction and of the gathering, without overlap."""
        degrees = (layout.dp, layout.shard, layout.tp, layout.pp, layout.cp, layout.ep, layout.offload)
        key = (*degrees, elements, experts)
        cost = self._collectives.get(key)
        if cost is None:
            cost = self._movement(layout, elements - experts, 1)
            if experts:
                more = self._movement(layout, experts, layout.ep)
                cost = PerStepCost(cost.gradients + more.gradients, cost.weights + more.weights)
            self._collectives[key] = cost
        return cost

    def _movement(self, layout: Layout, elements: float, apart: int) -> PerStepCost:
        """For parameters that every `apart`-th data-parallel rank holds alike."""
        if self.framework.optimizer_shard == "dp" and layout.shard == 1:
            # distributed optimizer: scatter gradients, gather updated weights
            everyone = self.network.group(layout.dp * layout.cp // apart, layout.tp * apart)
            scatter = self.network.reduce_scatter(elements * self.blocks.gradient_bytes, everyone)
            return PerStepCost(scatter, self.network.all_gather(elements * self.blocks.gathered_bytes, everyone))
        seconds = self.blocks.movement(layout, elements, apart)
        reduce = 0.0 if self.framework.reduces_in_blocks(layout) else seconds.scatter + seconds.sum
        return PerStepCost(reduce, seconds.gather if weights_stay_gathered(layout) else 0.0)

    def update(self, layout: Layout, elements: float, experts: float = 0.0) -> float:
        """The optimizer's step on a rank's part of `elements`, `experts` of which are split over fewer ranks."""
        compute = self.blocks.compute
        if isinstance(compute, CpuCompute):
            return compute.optimizer(elements / layout.shard) + compute.step(elements, layout)
        spread = layout.shard
        if self.framework.optimizer_shard == "dp":
            spread = layout.dp * layout.cp
        own = (elements - experts) / spread + experts / max(1, spread // layout.ep)
        return compute.optimizer(own, offload=layout.offload)
