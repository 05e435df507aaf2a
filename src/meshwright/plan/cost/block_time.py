"""Seconds of one micro-batch through one block on one rank: the arithmetic, and the waits for other ranks.

Tensor parallelism adds up partial sums, context parallelism exchanges keys and values, experts exchange tokens, and
sharded weights are gathered before use. Communication that a framework overlaps hides behind computing and slows it;
the rank waits for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.card import Block
from meshwright.layout import Layout
from meshwright.plan.constants import Profile
from meshwright.plan.cost.block_memory import ELEMENT_BYTES, BlockMemory
from meshwright.plan.cost.cpu import CpuCompute
from meshwright.plan.cost.gpu import Compute, axis_split, local_elements, split_key
from meshwright.plan.cost.network import network
from meshwright.plan.rules.frameworks import weights_stay_gathered
from meshwright.plan.workload import Workload

#: Collectives per exchange that the host starts: a gather and a scatter, or tokens sent and returned.
_PAIRS = 2


@dataclass(frozen=True)
class BlockCost:
    """One micro-batch through one block on one rank. `forward` and `backward` are the device's seconds including the
    waits `*_wait` for other ranks; `weight` is the part of the backward that computes weight gradients; `host_*` are
    the host's seconds to start the operations."""

    forward: float
    backward: float
    weight: float
    forward_wait: float
    backward_wait: float
    host_forward: float
    host_backward: float


def block_key(layout: Layout) -> tuple[object, ...]:
    """The part of a layout that the cost of a block depends on."""
    return (
        layout.tp,
        layout.cp,
        layout.ep,
        layout.sequence_parallel,
        layout.micro_batch,
        layout.recompute,
        layout.offload,
        layout.pp > 1,
        (1, 1) if weights_stay_gathered(layout) else (layout.shard, layout.dp * layout.cp),
    )


@dataclass(frozen=True)
class ParameterSeconds:
    """Seconds of moving parameters between data-parallel ranks, without overlap: gathering weights in a shard group,
    reduce-scattering their gradients there, and summing gradients over the groups."""

    gather: float = 0.0
    scatter: float = 0.0
    sum: float = 0.0

    def __add__(self, other: ParameterSeconds) -> ParameterSeconds:
        return ParameterSeconds(self.gather + other.gather, self.scatter + other.scatter, self.sum + other.sum)


class BlockTimes:
    """Costs of the blocks of one workload by one profile."""

    def __init__(self, workload: Workload, profile: Profile, memory: BlockMemory) -> None:
        self.workload, self.profile, self.memory = workload, profile, memory
        cluster, precision, framework = workload.cluster, workload.precision, workload.framework
        self.precision, self.framework = precision, framework
        self.network = network(cluster, profile)
        on_cpu = cluster.device.kind == "cpu"  # the same cores move the bytes
        self.compute = (CpuCompute if on_cpu else Compute)(cluster.device, precision, profile, framework)
        constants = profile.constants
        self.slows = constants["cuda.overlap.slows"]
        self.overlap = 0.0 if on_cpu else min(1.0, constants["cuda.overlap.share"])
        self.collective_start = 0.0 if on_cpu else constants["cuda.host.collective_seconds"]
        self.offload_speed = constants["cuda.offload.bytes_per_second"]
        self.gradient_bytes = framework.gradient_wire_bytes or ELEMENT_BYTES[precision]
        self.gathered_bytes = ELEMENT_BYTES[precision]
        self._exchanges: dict[tuple[object, ...], _ExchangeSeconds] = {}
        self._gathers: dict[tuple[object, ...], ParameterSeconds] = {}
        self._elements: dict[tuple[object, ...], tuple[int, int]] = {}

    def cost(self, layout: Layout, block: Block, inputs: int) -> BlockCost:
        """The cost of `block`, whose input has `inputs` elements per sample."""
        seconds = self.compute.block(block, layout)
        copied, added = self._parameter_passes(layout, block)
        forward, backward = seconds.forward + copied, seconds.backward + seconds.recompute + copied + added
        framework, exchange = self.framework, self._exchange(layout, block, inputs)
        again = self._recomputes(layout, block)
        ahead = [(exchange.tensor[0], framework.tensor_overlap)]
        back = [(exchange.tensor[1] + exchange.tensor[0] * again, framework.tensor_overlap)]
        if exchange.context:
            ahead.append((exchange.context, framework.context_overlap))
            back.append((exchange.context * (2 + again), framework.context_overlap))
        if exchange.experts:
            ahead.append((exchange.experts, 0.0))
            back.append((exchange.experts * (1 + again), 0.0))
        if not weights_stay_gathered(layout):
            shard = self._shard_seconds(layout, block)
            reduction = shard.scatter + shard.sum if framework.reduces_in_blocks(layout) else 0.0
            ahead.append((shard.gather, framework.gather_overlap))
            back.append((shard.gather + reduction, framework.gather_overlap))
        if framework.activation_offload:
            offload = (self._offload_seconds(layout, block, inputs), 1.0)
            ahead.append(offload)
            back.append(offload)
        wait, wait_back = self._exposed(forward, ahead), self._exposed(backward, back)
        starts, starts_back = self._collective_starts(layout, block, exchange.sums)
        return BlockCost(
            forward=forward + wait,
            backward=backward + wait_back,
            weight=seconds.weight + added,
            forward_wait=wait,
            backward_wait=wait_back,
            host_forward=seconds.host_forward + starts,
            host_backward=seconds.host_backward + seconds.host_recompute + starts_back,
        )

    def _parameter_passes(self, layout: Layout, block: Block) -> tuple[float, float]:
        """Seconds of memory traffic over a block's parameters: copies when sharded ones are gathered, in each pass, and
        adding gradients to those of earlier micro-batches."""
        if isinstance(self.compute, CpuCompute):  # counts them itself
            return 0.0, 0.0
        seconds = sum(self.local_parameters(layout, block)) / self.compute.memory
        copied = 0.0 if weights_stay_gathered(layout) else seconds * self.framework.copy_bytes
        return copied, seconds * self.framework.accumulate_bytes

    def local_parameters(self, layout: Layout, block: Block) -> tuple[int, int]:
        """Elements of a block's experts, and of its other parameters, that one rank holds before sharding."""
        key = (id(block), layout.tp, layout.ep)
        if key not in self._elements:
            whole = local_elements(block.parameters, layout.tp, layout.ep)
            experts = local_elements((p for p in block.parameters if "expert" in p.axes), layout.tp, layout.ep)
            self._elements[key] = (experts, whole - experts)
        return self._elements[key]

    def _exposed(self, computing: float, communication: Sequence[tuple[float, float]]) -> float:
        """Seconds that communication, each (seconds, share that may hide), adds to `computing` seconds, all of which it
        can hide behind: the slow-down of computing, and the rest that is waited for."""
        wait, room = 0.0, computing
        for seconds, share in communication:
            hidden = min(seconds * share * self.overlap, room)
            wait, room = wait + hidden * self.slows + seconds - hidden, room - hidden
        return wait

    def _exchange(self, layout: Layout, block: Block, inputs: int) -> _ExchangeSeconds:
        key = (id(block), inputs, *split_key(layout))
        exchange = self._exchanges.get(key)
        if exchange is None:
            sums = tensor_sums(block) if layout.tp > 1 else (0, 0)
            each = self._sum_seconds(layout, inputs) if layout.tp > 1 else 0.0
            tensor = (sums[0] * each, sums[1] * each)
            context, experts = self._context_seconds(layout, block), self._expert_seconds(layout, block)
            exchange = self._exchanges[key] = _ExchangeSeconds(block, sums, tensor, context, experts)
        return exchange

    def _sum_seconds(self, layout: Layout, inputs: int) -> float:
        """One sum over tensor-parallel ranks: an all-reduce, or an all-gather and a reduce-scatter."""
        size = inputs * layout.micro_batch / layout.cp * ELEMENT_BYTES[self.precision]
        group = self.network.group(layout.tp, 1)
        if layout.sequence_parallel:
            return self.network.all_gather(size, group) + self.network.reduce_scatter(size, group)
        return self.network.all_reduce(size, group)

    def _context_seconds(self, layout: Layout, block: Block) -> float:
        """Gathering the keys and values of the other context-parallel ranks."""
        shape = block.attention
        if layout.cp == 1 or shape is None:
            return 0.0
        width = shape.kv_heads / min(layout.tp, shape.kv_heads) * (shape.head_dim + (shape.value_dim or shape.head_dim))
        size = width * shape.seq_len * layout.micro_batch * ELEMENT_BYTES[self.precision]
        return self.network.all_gather(size, self.network.group(layout.cp, layout.tp))

    def _expert_seconds(self, layout: Layout, block: Block) -> float:
        """Sending tokens to their experts and back, on the busiest rank."""
        experts = block.experts
        if layout.ep == 1 or experts is None:
            return 0.0
        tokens = experts.top_k * experts.imbalance * block.output_elements * layout.micro_batch / layout.cp
        size = tokens * ELEMENT_BYTES[self.precision] / (layout.tp if layout.sequence_parallel else 1)
        return 2 * self.network.all_to_all(size, self.network.group(layout.ep, layout.tp))

    def _shard_seconds(self, layout: Layout, block: Block) -> ParameterSeconds:
        """A block's sharded weights gathered before a pass, and its gradients reduced. Every ep-th rank holds the same
        experts."""
        key = (id(block), layout.tp, layout.ep, layout.dp * layout.cp, layout.shard)
        seconds = self._gathers.get(key)
        if seconds is None:
            experts, dense = self.local_parameters(layout, block)
            seconds = self._gathers[key] = self.movement(layout, dense, 1) + self.movement(layout, experts, layout.ep)
        return seconds

    def movement(self, layout: Layout, elements: float, apart: int) -> ParameterSeconds:
        """Moving `elements` parameters between data-parallel ranks, of which every `apart`-th holds the same ones."""
        data, shard = layout.dp * layout.cp // apart, max(1, layout.shard // apart)
        sharded = self.network.group(shard, layout.tp * apart)
        replicas = self.network.group(data // shard, layout.tp * apart * shard)
        return ParameterSeconds(
            self.network.all_gather(elements * self.gathered_bytes, sharded),
            self.network.reduce_scatter(elements * self.gradient_bytes, sharded),
            self.network.all_reduce(elements / shard * self.gradient_bytes, replicas),
        )

    def _offload_seconds(self, layout: Layout, block: Block, inputs: int) -> float:
        """Moving activations to the host after the forward, or back before the backward; the loss's stay."""
        memory = self.memory.block_bytes(block, inputs, layout)
        return (memory.saved - memory.loss) / self.offload_speed

    def _recomputes(self, layout: Layout, block: Block) -> bool:
        """Whether the backward repeats this block's forward and its collectives."""
        return layout.recompute == "full" and block.kind not in self.framework.never_recomputed

    def _collective_starts(self, layout: Layout, block: Block, sums: tuple[int, int]) -> tuple[float, float]:
        """Host seconds of starting the collectives, forward and backward."""
        ahead = back = 0.0
        if layout.tp > 1:
            each = _PAIRS if layout.sequence_parallel else 1
            ahead, back = float(sums[0] * each), float(sums[1] * each)
        if not weights_stay_gathered(layout):
            ahead, back = ahead + 1, back + 2
        if layout.cp > 1 and block.attention:
            ahead, back = ahead + layout.cp, back + layout.cp
        if layout.ep > 1 and block.experts:
            ahead, back = ahead + _PAIRS, back + _PAIRS
        back += ahead * self._recomputes(layout, block)
        return ahead * self.collective_start, back * self.collective_start


@dataclass(frozen=True)
class _ExchangeSeconds:
    """Exchanges of a micro-batch through a block, without overlap. `sums` counts those over tensor-parallel ranks,
    forward and backward, `tensor` are their seconds. The block is held so that the id in its key is not reused."""

    block: Block
    sums: tuple[int, int]
    tensor: tuple[float, float]
    context: float
    experts: float


def tensor_sums(block: Block) -> tuple[int, int]:
    """Number of sums over tensor-parallel ranks that a block needs, forward and backward.

    A parameter split by its inner axis leaves partial sums forward, and so does a split table of embeddings. A block
    with parameters split by their inner axis has as many sums backward; one split by outer axes alone (the head), one.
    """
    matrices = [p.axes for p in block.parameters if len(p.axes) >= 2]
    inner = sum(axis_split(axes[-1]) for axes in matrices)
    if block.experts:  # the shared and the routed experts' partial sums are added in one
        inner = min(inner, 2)
    outer = sum(axis_split(axes[-2]) for axes in matrices)
    ahead = inner + (1 if outer and not block.products else 0)
    back = inner if inner else (1 if outer and block.products else 0)
    return ahead, back
