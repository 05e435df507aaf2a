"""What a step does once: gradients reduced, weights gathered where they are kept, the optimizer, the host's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.layout import Layout
from meshwright.plan.cost.block_time import BlockTimes
from meshwright.plan.cost.cpu import CpuCompute
from meshwright.plan.pipeline import TABLE
from meshwright.plan.rules.frameworks import kept_gathered


@dataclass(frozen=True)
class PerStepCost:
    """Seconds waited for once a step: gradients' reduction and weights' gathering, less what hides behind compute."""

    gradients: float = 0.0
    weights: float = 0.0

    @property
    def waits(self) -> float:
        return self.gradients + self.weights


class PerStepTimes:
    """What a workload does once a step, on the wires and at the speed of its blocks."""

    def __init__(self, blocks: BlockTimes) -> None:
        card = blocks.workload.card
        self.blocks, self.network, self.framework = blocks, blocks.network, blocks.framework
        self.device, self.constants = blocks.workload.cluster.device, blocks.profile.constants
        self.on_cpu = self.device.kind == "cpu"
        self.units = card.units_per_sample
        shared = {first for first, _ in card.tied}
        self.tied = sum(p.elements for p in card.parameters if p.name in shared)
        self.host_seconds = 0.0 if self.on_cpu else self.constants["cuda.step_seconds"]
        self._known: dict[tuple[object, ...], PerStepCost] = {}
        self._norms: dict[int, float] = {}

    def reading_seconds(self, samples: int) -> float:
        """To read so many samples and put them on the device; nothing where others read ahead."""
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
        """What a step waits for, whose ranks hold `elements` of parameters, of them `experts`, and whose last backward
        takes so long. Experts' gradients are summed only over the ranks that hold the same experts.

        Without overlap every stage reduces once the pipeline has drained, and the largest is waited for; with it, the
        first stage, which ends last, has its own last backwards to hide behind: one, or where stages are interleaved,
        whose chunks end one after another, those of as many micro-batches as there are stages. Gathering what was
        updated hides behind the first forwards likewise.
        """
        behind = 0.0 if self.on_cpu else self.blocks.overlap
        share, share_of_gather = self.framework.gradient_overlap * behind, self.framework.gather_overlap * behind
        window = last_backward * (min(layout.pp, micro_batches) if layout.vpp > 1 else 1)
        first = bool(share) and layout.pp > 1
        mine, of_experts = (held[0] if first else max(held) for held in (elements, experts))
        if layout.ep == 1:
            of_experts = 0.0
        key = (layout.dp, layout.shard, layout.tp, layout.pp, layout.cp, layout.ep, layout.offload, mine, of_experts)
        reduce, gather = self._moved(key, layout, mine, of_experts)
        reduce = max(0.0, reduce - share * window)
        gather = max(0.0, gather - share_of_gather * window / 2)  # a forward takes half of a backward
        if self.tied and layout.pp > 1 and not TABLE[layout.schedule].folded:  # a V has both ends on one rank
            far = self.network.group(2, layout.devices // 2)
            size = self.tied * self.blocks.gradient_bytes / layout.tp
            reduce += self.network.all_reduce(size, far)
        return PerStepCost(reduce + self._norm(layout.devices), gather)

    def _norm(self, devices: int) -> float:
        """Summing the gradient's norm over all ranks, for clipping."""
        if devices not in self._norms:
            self._norms[devices] = self.network.all_reduce(8, self.network.group(devices, 1))
        return self._norms[devices]

    def _moved(self, key: tuple[object, ...], layout: Layout, elements: float, experts: float) -> tuple[float, float]:
        """Seconds of the reduction and of the gathering, nothing hidden."""
        found = self._known.get(key)
        if found is None:
            found = self._new(layout, elements - experts, 1)
            if experts:
                own = self._new(layout, experts, layout.ep)
                found = PerStepCost(found.gradients + own.gradients, found.weights + own.weights)
            self._known[key] = found
        return found.gradients, found.weights

    def _new(self, layout: Layout, elements: float, apart: int) -> PerStepCost:
        """For parameters of which every `apart`-th data-parallel rank holds the same."""
        if self.framework.optimizer_shard == "dp" and layout.shard == 1:
            # distributed optimizer: scatter gradients, gather what was updated
            everyone = self.network.group(layout.dp * layout.cp // apart, layout.tp * apart)
            scatter = self.network.reduce_scatter(elements * self.blocks.gradient_bytes, everyone)
            return PerStepCost(scatter, self.network.all_gather(elements * self.blocks.gathered_bytes, everyone))
        moved = self.blocks.movement(layout, elements, apart)
        reduce = 0.0 if self.framework.reduces_in_blocks(layout) else moved.scatter + moved.sum
        return PerStepCost(reduce, moved.gather if kept_gathered(layout) else 0.0)

    def update(self, layout: Layout, elements: float, experts: float = 0.0) -> float:
        """The optimizer's step on a rank's part of `elements`, of them `experts`, which fewer ranks share."""
        compute = self.blocks.compute
        if isinstance(compute, CpuCompute):
            return compute.optimizer(elements / layout.shard) + compute.once(elements, layout)
        spread = layout.shard
        if self.framework.optimizer_shard == "dp":
            spread = layout.dp * layout.cp
        own = (elements - experts) / spread + experts / max(1, spread // layout.ep)
        return compute.optimizer(own, offload=layout.offload)
