"""What a Layout would take: joins compute, network, schedule and memory into seconds and bytes per stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from meshwright.card import Block, Card
from meshwright.cluster import Cluster
from meshwright.layout import Layout
from meshwright.plan.compute import BYTES, axis_split, block_seconds, local_elements, optimizer_seconds
from meshwright.plan.memory import StageMemory, saved_bytes, stage_memory
from meshwright.plan.network import (
    all_gather_seconds,
    all_reduce_seconds,
    point_to_point_seconds,
    reduce_scatter_seconds,
)
from meshwright.plan.schedule import Timeline, actions, balance_costs, in_flight, replay, span_seconds

#: Share of the computing time that can hide the gathering of weights and the reduction of gradients behind it.
OVERLAP = {"cpu": 0.0, "cuda": 0.8}  # on a CPU the same core moves the bytes


@dataclass(frozen=True)
class BlockCost:
    """One micro-batch through one block on one rank: seconds of arithmetic, of waiting for others, and bytes kept."""

    forward: float
    backward: float
    forward_wait: float
    backward_wait: float
    kept_bytes: int
    working_bytes: int


@dataclass(frozen=True)
class Estimate:
    """The prediction for one Layout, in parts. Stage tuples have one entry a stage, seconds of one micro-batch."""

    layout: Layout
    micro_batches: int
    first_blocks: tuple[int, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    transfer_seconds: float
    compute_seconds: float  # arithmetic of the slowest stage, whole step
    communication_seconds: float  # waiting for collectives, whole step, slowest stage
    bubble_seconds: float
    optimizer_seconds: float
    step_seconds: float
    memory: tuple[StageMemory, ...]

    @property
    def peak_bytes(self) -> int:
        return max(stage.total for stage in self.memory)

    def timeline(self) -> Timeline:
        """The schedule replayed with these stages."""
        orders = actions(self.layout.schedule, self.layout.pp, self.micro_batches)
        return replay(orders, self.forward_seconds, self.backward_seconds, self.transfer_seconds)


class Estimator:
    """Estimates layouts of one card on one cluster; equal blocks are computed once, shared parts remembered."""

    def __init__(self, card: Card, cluster: Cluster, global_batch: int, precision: str) -> None:
        self.card, self.cluster, self.global_batch, self.precision = card, cluster, global_batch, precision
        self._costs: dict[tuple[object, ...], tuple[BlockCost, ...]] = {}
        self._elements: dict[int, tuple[int, ...]] = {}
        self._cuts: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._sums: dict[tuple[object, ...], tuple[list[float], ...]] = {}

    @cached_property
    def _kinds(self) -> tuple[list[tuple[Block, int]], list[int]]:
        """Distinct blocks with the elements they are given, and the kind of each block of the card."""
        known: dict[object, int] = {}
        kinds: list[tuple[Block, int]] = []
        index = []
        given = self.card.blocks[0].output_elements
        for place, block in enumerate(self.card.blocks):
            shapes = tuple((p.shape, p.axes) for p in block.parameters)
            last = place == len(self.card.blocks) - 1
            key = (
                block.kind,
                shapes,
                block.products,
                block.attention,
                block.saved,
                block.elementwise_elements,
                given,
                last,
            )
            if key not in known:
                known[key] = len(kinds)
                kinds.append((block, given))
            index.append(known[key])
            given = block.output_elements
        return kinds, index

    @cached_property
    def _tied_elements(self) -> int:
        shared = {first for first, _ in self.card.tied}
        return sum(p.elements for p in self.card.parameters if p.name in shared)

    def estimate(self, layout: Layout, *, exact: bool = False) -> Estimate:
        """Seconds and bytes of a layout that no rule refuses; `exact` replays the schedule instead of its formula."""
        blocks = len(self.card.blocks)
        m, pp = layout.micro_batches(self.global_batch), layout.pp
        forward, backward, waits, params, kept = self._stage_sums(layout)
        cut = self.stages(layout)
        edges = list(zip(cut, (*cut[1:], blocks), strict=True))

        def per_stage(sums: list[float]) -> tuple[float, ...]:
            return tuple(sums[stop] - sums[start] for start, stop in edges)

        stage_forward, stage_backward, stage_wait = per_stage(forward), per_stage(backward), per_stage(waits)
        transfer = self._transfer_seconds(layout)
        orders_seconds = span_seconds(layout.schedule, m, stage_forward, stage_backward, transfer)
        if exact and pp > 1:
            orders = actions(layout.schedule, pp, m)
            orders_seconds = replay(orders, stage_forward, stage_backward, transfer).seconds
        slowest = max(range(pp), key=lambda s: stage_forward[s] + stage_backward[s])
        busy = m * (stage_forward[slowest] + stage_backward[slowest])
        wait = m * stage_wait[slowest]
        elements = max(per_stage(params))
        once = self._once_a_step_seconds(layout, elements, stage_backward[slowest])
        update = optimizer_seconds(elements / layout.shard, self.cluster.device)
        return Estimate(
            layout=layout,
            micro_batches=m,
            first_blocks=cut,
            forward_seconds=stage_forward,
            backward_seconds=stage_backward,
            transfer_seconds=transfer,
            compute_seconds=busy - wait,
            communication_seconds=wait + once,
            bubble_seconds=max(0.0, orders_seconds - busy),
            optimizer_seconds=update,
            step_seconds=orders_seconds + once + update,
            memory=self._memory(layout, edges, per_stage(params), per_stage(kept), m),
        )

    def stages(self, layout: Layout) -> tuple[int, ...]:
        """Index of each stage's first block: the slowest stage as quick as can be."""
        if layout.pp == 1:
            return (0,)
        key = (*_block_key(layout), layout.pp)
        if key not in self._cuts:
            forward, backward, *_ = self._stage_sums(layout)
            costs = [forward[i + 1] - forward[i] + backward[i + 1] - backward[i] for i in range(len(forward) - 1)]
            self._cuts[key] = balance_costs(costs, layout.pp)
        return self._cuts[key]

    def _stage_sums(self, layout: Layout) -> tuple[list[float], ...]:
        """Running sums over the blocks: forward and backward seconds (waits included), waits, local parameters,
        bytes kept."""
        key = _block_key(layout)
        if key not in self._sums:
            costs, index = self._block_costs(layout), self._kinds[1]
            rows = [
                (
                    c.forward + c.forward_wait,
                    c.backward + c.backward_wait,
                    c.forward_wait + c.backward_wait,
                    n,
                    c.kept_bytes,
                )
                for c, n in zip(costs, self._kind_elements(layout.tp), strict=True)
            ]
            self._sums[key] = tuple(
                list(accumulate((rows[k][column] for k in index), initial=0.0)) for column in range(5)
            )
        return self._sums[key]

    def _block_costs(self, layout: Layout) -> tuple[BlockCost, ...]:
        """Costs by kind of block."""
        key = _block_key(layout)
        if key not in self._costs:
            self._costs[key] = tuple(self._block_cost(layout, block, given) for block, given in self._kinds[0])
        return self._costs[key]

    def _kind_elements(self, tp: int) -> tuple[int, ...]:
        """Parameters of each kind of block that one of `tp` ranks holds."""
        if tp not in self._elements:
            self._elements[tp] = tuple(local_elements(block.parameters, tp) for block, _ in self._kinds[0])
        return self._elements[tp]

    def _block_cost(self, layout: Layout, block: Block, given: int) -> BlockCost:
        recompute = layout.recompute
        seconds = block_seconds(
            block,
            self.cluster.device,
            tp=layout.tp,
            sequence_parallel=layout.sequence_parallel,
            micro_batch=layout.micro_batch,
            precision=self.precision,
            recompute=recompute,
        )
        forward_wait, backward_wait = self._tensor_waits(layout, block, given, recompute)
        if not _kept_gathered(layout):  # gathered anew for every pass of every micro-batch
            gather = self._gather_seconds(layout, local_elements(block.parameters, layout.tp))
            hidden = OVERLAP[self.cluster.device.kind]
            forward_wait += max(0.0, gather - hidden * seconds.forward)
            backward_wait += max(0.0, gather - hidden * (seconds.backward + seconds.recompute))
        split = {"tp": layout.tp, "sequence_parallel": layout.sequence_parallel, "precision": self.precision}
        whole = saved_bytes(block, recompute="none", **split)  # type: ignore[arg-type]
        kept = saved_bytes(block, recompute=recompute, **split)  # type: ignore[arg-type]
        entry = given * BYTES[self.precision] // (layout.tp if layout.sequence_parallel else 1)
        if recompute == "full":
            kept = entry
        return BlockCost(
            forward=seconds.forward,
            backward=seconds.backward + seconds.recompute,
            forward_wait=forward_wait,
            backward_wait=backward_wait,
            kept_bytes=kept * layout.micro_batch,
            working_bytes=(whole - min(kept, whole) + 2 * entry) * layout.micro_batch,
        )

    def _tensor_waits(self, layout: Layout, block: Block, given: int, recompute: str) -> tuple[float, float]:
        """All-reduces of tensor parallelism (or the gather and scatter that replace them), forward and backward.

        A parameter split by its inner axis leaves partial sums to add, and so does a split table of embeddings; each
        has its mirror backward. A block split by outer axes alone (the head) has only the mirror.
        """
        if layout.tp == 1:
            return 0.0, 0.0
        matrices = [p.axes for p in block.parameters if len(p.axes) == 2]
        inner = sum(axis_split(axes[1]) for axes in matrices)
        outer = sum(axis_split(axes[0]) for axes in matrices)
        ahead = inner + (1 if outer and not block.products else 0)
        back = inner if inner else (1 if outer and block.products else 0)
        size = given * layout.micro_batch * BYTES[self.precision]
        once = all_reduce_seconds(size, layout.tp, self.cluster.link(layout.tp))
        return ahead * once, (back + (ahead if recompute == "full" else 0)) * once

    def _gather_seconds(self, layout: Layout, elements: float) -> float:
        """Gathering sharded weights in the compute precision."""
        link = self.cluster.link(layout.tp * layout.shard)
        return all_gather_seconds(elements * BYTES[self.precision], layout.shard, link)

    def _transfer_seconds(self, layout: Layout) -> float:
        """Handing a micro-batch's activations to the next stage."""
        if layout.pp == 1:
            return 0.0
        elements = self.card.blocks[0].output_elements * layout.micro_batch
        size = elements * BYTES[self.precision] / (layout.tp if layout.sequence_parallel else 1)
        return point_to_point_seconds(size, self.cluster.link(layout.devices))

    def _once_a_step_seconds(self, layout: Layout, elements: float, last_backward: float) -> float:
        """Gradients reduced over shards and replicas behind the last backward, weights gathered once where they are
        kept, tied embeddings over the pipeline's ends, the norm for clipping."""
        link = self.cluster.link(layout.tp * layout.dp * layout.cp)
        reduce = reduce_scatter_seconds(elements * 4, layout.shard, self.cluster.link(layout.tp * layout.shard))
        reduce += all_reduce_seconds(elements / layout.shard * 4, layout.replicate, link)
        seconds = max(0.0, reduce - OVERLAP[self.cluster.device.kind] * last_backward)
        if _kept_gathered(layout):
            seconds += self._gather_seconds(layout, elements)
        everywhere = self.cluster.link(layout.devices)
        if layout.pp > 1 and self._tied_elements:
            seconds += all_reduce_seconds(self._tied_elements * 4 / layout.tp, 2, everywhere)
        return seconds + all_reduce_seconds(8, layout.devices, everywhere)

    def _memory(
        self,
        layout: Layout,
        edges: list[tuple[int, int]],
        elements: tuple[float, ...],
        kept_bytes: tuple[float, ...],
        micro_batches: int,
    ) -> tuple[StageMemory, ...]:
        costs, index, sizes = self._block_costs(layout), self._kinds[1], self._kind_elements(layout.tp)
        stages = []
        for stage, (start, stop) in enumerate(edges):
            mine = set(index[start:stop])
            # The alias of a tied embedding has a copy of its own on the last stage.
            alias = self._tied_elements // layout.tp if layout.pp > 1 and stage == layout.pp - 1 else 0
            stages.append(
                stage_memory(
                    elements=int(elements[stage]) + alias,
                    largest_block_elements=max(sizes[kind] for kind in mine),
                    kept_bytes=int(kept_bytes[stage]),
                    working_bytes=max(costs[kind].working_bytes for kind in mine),
                    in_flight=in_flight(layout.schedule, layout.pp, stage, micro_batches),
                    shard=layout.shard,
                    kept_gathered=_kept_gathered(layout),
                    accumulates=micro_batches > 1,
                    precision=self.precision,
                    device=self.cluster.device,
                )
            )
        return tuple(stages)


def _kept_gathered(layout: Layout) -> bool:
    """Whether a stage's weights stay gathered through the step: replicated ones do, and those of a pipeline."""
    return layout.shard == 1 or layout.pp > 1


def _block_key(layout: Layout) -> tuple[object, ...]:
    """What the cost of a block depends on."""
    return (
        layout.tp,
        layout.sequence_parallel,
        layout.micro_batch,
        layout.recompute,
        1 if _kept_gathered(layout) else layout.shard,
    )
