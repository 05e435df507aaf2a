"""What a step does once: gradients reduced, weights gathered where they are kept, the optimizer, the host's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.card import Card
from meshwright.layout import Layout
from meshwright.plan.blocks import Blocks, kept_gathered
from meshwright.plan.compute import BYTES
from meshwright.plan.cpu import CpuCompute


@dataclass(frozen=True)
class Once:
    """Seconds waited for once a step: gradients' reduction and weights' gathering, less what hides behind compute."""

    gradients: float = 0.0
    weights: float = 0.0

    @property
    def waits(self) -> float:
        return self.gradients + self.weights


class OnceAStep:
    """The once-a-step work of a card, on the wires and at the speed of its blocks."""

    def __init__(self, blocks: Blocks, card: Card) -> None:
        self.blocks, self.network, self.framework = blocks, blocks.network, blocks.framework
        self.device, self.constants = blocks.cluster.device, blocks.profile.constants
        self.on_cpu = self.device.kind == "cpu"
        shared = {first for first, _ in card.tied}
        self.tied = sum(p.elements for p in card.parameters if p.name in shared)
        self.host_seconds = 0.0 if self.on_cpu else self.constants["cuda.step_seconds"]
        self._known: dict[tuple[object, ...], Once] = {}
        self._norms: dict[int, float] = {}

    def seconds(
        self,
        layout: Layout,
        elements: Sequence[float],
        last_backward: float,
        micro_batches: int,
        experts: Sequence[float] = (0.0,),
    ) -> Once:
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
        if layout.pp > 1 and self.tied:
            far = self.network.group(2, layout.devices // 2)
            size = self.tied * (self.framework.gradient_wire_bytes or BYTES[self.blocks.precision]) / layout.tp
            reduce += self.network.all_reduce(size, far)
        return Once(reduce + self._norm(layout.devices), gather)

    def _norm(self, devices: int) -> float:
        """Summing the gradient's norm over all ranks, for clipping."""
        if devices not in self._norms:
            self._norms[devices] = self.network.all_reduce(8, self.network.group(devices, 1))
        return self._norms[devices]

    def _moved(self, key: tuple[object, ...], layout: Layout, elements: float, experts: float) -> tuple[float, float]:
        """Seconds of the reduction and of the gathering, nothing hidden."""
        found = self._known.get(key)
        if found is None:
            data = layout.dp * layout.cp
            found = self._new(layout, elements - experts, data, 1)
            if experts:
                own = self._new(layout, experts, data // layout.ep, layout.ep)
                found = Once(found.gradients + own.gradients, found.weights + own.weights)
            self._known[key] = found
        return found.gradients, found.weights

    def _new(self, layout: Layout, elements: float, data: int, apart: int) -> Once:
        """For parameters of which `data` ranks, each `apart` data-parallel ranks from the next, hold the same."""
        width = self.framework.gradient_wire_bytes or BYTES[self.blocks.precision]
        shard, stride = max(1, layout.shard // apart), layout.tp * apart
        sharded, everyone = self.network.group(shard, stride), self.network.group(data, stride)
        weight = elements * self.blocks.gathered_bytes
        if self.framework.optimizer_shard == "dp" and layout.shard == 1:
            # distributed optimizer: scatter gradients, gather what was updated
            scatter = self.network.reduce_scatter(elements * width, everyone)
            return Once(scatter, self.network.all_gather(weight, everyone))
        reduce = 0.0
        if layout.shard > 1 and (kept_gathered(layout) or not self.framework.reduces_each):
            reduce = self.network.reduce_scatter(elements * width, sharded)
        replicas = self.network.group(data // shard, stride * shard)
        reduce += self.network.all_reduce(elements / shard * width, replicas)
        gather = self.network.all_gather(weight, sharded) if kept_gathered(layout) else 0.0
        return Once(reduce, gather)

    def update(self, layout: Layout, elements: float) -> float:
        """The optimizer's step on what a rank holds of `elements`."""
        compute = self.blocks.compute
        if isinstance(compute, CpuCompute):
            return compute.optimizer(elements / layout.shard) + compute.once(elements, layout)
        spread = layout.shard
        if self.framework.optimizer_shard == "dp":
            spread = layout.dp * layout.cp
        return compute.optimizer(elements / spread, offload=layout.offload)
