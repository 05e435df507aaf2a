"""What one micro-batch through one block costs one rank: the arithmetic, and what it waits for from others.

Tensor parallelism adds up partial sums, context parallelism passes keys and values on, experts exchange tokens, and
sharded weights are gathered before use. What a framework runs beside its computing is taken from that time, and slows
it; the rest is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.card import Block
from meshwright.layout import Layout
from meshwright.plan.constants import Profile
from meshwright.plan.cost.block_memory import BlockMemory
from meshwright.plan.cost.cpu import CpuCompute
from meshwright.plan.cost.gpu import BYTES, Compute, axis_split, local_elements, split_key
from meshwright.plan.cost.network import network
from meshwright.plan.rules.frameworks import kept_gathered
from meshwright.plan.workload import Workload

#: Collectives that a block starts for each of what it waits for: host time goes by them.
_PAIRS = 2


@dataclass(frozen=True)
class BlockCost:
    """One micro-batch through one block on one rank. `forward` and `backward` are the device's seconds, waits for
    others included; `*_wait` says how much of them that is; `weight` is the part of the backward that gives weights'
    gradients; `host_*` what the host takes to start it all."""

    forward: float
    backward: float
    weight: float
    forward_wait: float
    backward_wait: float
    host_forward: float
    host_backward: float


def block_key(layout: Layout) -> tuple[object, ...]:
    """What the cost of a block depends on."""
    return (
        layout.tp,
        layout.cp,
        layout.ep,
        layout.sequence_parallel,
        layout.micro_batch,
        layout.recompute,
        layout.offload,
        layout.pp > 1,
        (1, 1) if kept_gathered(layout) else (layout.shard, layout.dp * layout.cp),
    )


@dataclass(frozen=True)
class ParameterSeconds:
    """Seconds of moving parameters between data-parallel ranks, nothing hidden: gathering weights over the ranks of a
    shard group, scattering their gradients over them, and summing gradients over the groups."""

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
        self.gradient_bytes = framework.gradient_wire_bytes or BYTES[precision]
        self.gathered_bytes = BYTES[precision]
        self._exchanges: dict[tuple[object, ...], _ExchangeSeconds] = {}
        self._gathers: dict[tuple[object, ...], ParameterSeconds] = {}
        self._elements: dict[tuple[object, ...], tuple[int, int]] = {}

    def cost(self, layout: Layout, block: Block, given: int) -> BlockCost:
        """The cost of `block`, which is handed `given` elements a sample."""
        seconds = self.compute.block(block, layout)
        copied, added = self._passes(layout, block)
        forward, backward = seconds.forward + copied, seconds.backward + seconds.recompute + copied + added
        sent, repeated, own = self._exchanges_of(layout, block, given), self._repeated(layout, block), self.framework
        ahead = [(sent.tensor[0], own.tensor_overlap)]
        back = [(sent.tensor[1] + sent.tensor[0] * repeated, own.tensor_overlap)]
        if sent.context:
            ahead.append((sent.context, own.context_overlap))
            back.append((sent.context * (2 + repeated), own.context_overlap))
        if sent.experts:
            ahead.append((sent.experts, 0.0))
            back.append((sent.experts * (1 + repeated), 0.0))
        if not kept_gathered(layout):
            moved = self._weights(layout, block)
            reduced = moved.scatter + moved.sum if own.reduces_in_blocks(layout) else 0.0
            ahead.append((moved.gather, own.gather_overlap))
            back.append((moved.gather + reduced, own.gather_overlap))
        if own.activation_offload:
            away = self._offloaded(layout, block, given)
            ahead, back = [*ahead, (away, 1.0)], [*back, (away, 1.0)]
        wait, wait_back = self._beside(forward, ahead), self._beside(backward, back)
        starts, starts_back = self._starts(layout, block, sent.sums)
        return BlockCost(
            forward=forward + wait,
            backward=backward + wait_back,
            weight=seconds.weight + added,
            forward_wait=wait,
            backward_wait=wait_back,
            host_forward=seconds.host_forward + starts,
            host_backward=seconds.host_backward + seconds.host_again + starts_back,
        )

    def _passes(self, layout: Layout, block: Block) -> tuple[float, float]:
        """Seconds of passing over a block's parameters: copies around the gathering of sharded ones, in each pass, and
        adding gradients to those of the micro-batches before."""
        if isinstance(self.compute, CpuCompute):  # counts them itself
            return 0.0, 0.0
        seconds = sum(self._held(layout, block)) / self.compute.memory
        copied = 0.0 if kept_gathered(layout) else seconds * self.framework.copy_bytes
        return copied, seconds * self.framework.accumulate_bytes

    def _held(self, layout: Layout, block: Block) -> tuple[int, int]:
        """Parameters of a block that one rank holds before sharding: those of experts, and the others."""
        key = (id(block), layout.tp, layout.ep)
        if key not in self._elements:
            whole = local_elements(block.parameters, layout.tp, layout.ep)
            experts = local_elements((p for p in block.parameters if "expert" in p.axes), layout.tp, layout.ep)
            self._elements[key] = (experts, whole - experts)
        return self._elements[key]

    def _beside(self, computing: float, sent: Sequence[tuple[float, float]]) -> float:
        """What communication, each (seconds, share of them that may hide), adds to the computing that it hides behind:
        the slow-down, and what is left over. All of it shares that computing."""
        wait, room = 0.0, computing
        for seconds, share in sent:
            hidden = min(seconds * share * self.overlap, room)
            wait, room = wait + hidden * self.slows + seconds - hidden, room - hidden
        return wait

    def _exchanges_of(self, layout: Layout, block: Block, given: int) -> _ExchangeSeconds:
        key = (id(block), given, *split_key(layout))
        found = self._exchanges.get(key)
        if found is None:
            sums = tensor_sums(block) if layout.tp > 1 else (0, 0)
            once = self._tensor(layout, given) if layout.tp > 1 else 0.0
            found = self._exchanges[key] = _ExchangeSeconds(
                block,
                sums,
                (sums[0] * once, sums[1] * once),
                self._context(layout, block),
                self._experts(layout, block),
            )
        return found

    def _tensor(self, layout: Layout, given: int) -> float:
        """One sum over tensor-parallel ranks: an all-reduce, or the gather and scatter that stand for it."""
        size = given * layout.micro_batch / layout.cp * BYTES[self.precision]
        group = self.network.group(layout.tp, 1)
        if layout.sequence_parallel:
            return self.network.all_gather(size, group) + self.network.reduce_scatter(size, group)
        return self.network.all_reduce(size, group)

    def _context(self, layout: Layout, block: Block) -> float:
        """Keys and values of the other context-parallel ranks, passed on beside attention; backward, their gradients
        too."""
        shape = block.attention
        if layout.cp == 1 or shape is None:
            return 0.0
        width = shape.kv_heads / min(layout.tp, shape.kv_heads) * (shape.head_dim + (shape.value_dim or shape.head_dim))
        size = width * shape.seq_len * layout.micro_batch * BYTES[self.precision]
        return self.network.all_gather(size, self.network.group(layout.cp, layout.tp))

    def _experts(self, layout: Layout, block: Block) -> float:
        """Tokens sent to their experts and back; the busiest rank decides."""
        experts = block.experts
        if layout.ep == 1 or experts is None:
            return 0.0
        tokens = experts.top_k * experts.imbalance * block.output_elements * layout.micro_batch / layout.cp
        size = tokens * BYTES[self.precision] / (layout.tp if layout.sequence_parallel else 1)
        return 2 * self.network.all_to_all(size, self.network.group(layout.ep, layout.tp))

    def _weights(self, layout: Layout, block: Block) -> ParameterSeconds:
        """A block's sharded weights gathered before a pass, and its gradients reduced. Of experts every ep-th rank
        holds the same."""
        key = (id(block), layout.tp, layout.ep, layout.dp * layout.cp, layout.shard)
        found = self._gathers.get(key)
        if found is None:
            experts, others = self._held(layout, block)
            found = self._gathers[key] = self.movement(layout, others, 1) + self.movement(layout, experts, layout.ep)
        return found

    def movement(self, layout: Layout, elements: float, apart: int) -> ParameterSeconds:
        """Moving `elements` of parameters between data-parallel ranks of which every `apart`-th holds the same."""
        data, shard = layout.dp * layout.cp // apart, max(1, layout.shard // apart)
        sharded = self.network.group(shard, layout.tp * apart)
        replicas = self.network.group(data // shard, layout.tp * apart * shard)
        return ParameterSeconds(
            self.network.all_gather(elements * self.gathered_bytes, sharded),
            self.network.reduce_scatter(elements * self.gradient_bytes, sharded),
            self.network.all_reduce(elements / shard * self.gradient_bytes, replicas),
        )

    def _offloaded(self, layout: Layout, block: Block, given: int) -> float:
        """Activations sent to the host after the forward, and fetched again before the backward; a loss stays."""
        kept = self.memory.of(block, given, layout)
        return (kept.kept - kept.loss) / self.offload_speed

    def _repeated(self, layout: Layout, block: Block) -> bool:
        """Whether the backward runs this block's forward, and its collectives, again."""
        return layout.recompute == "full" and block.kind not in self.framework.never_recomputed

    def _starts(self, layout: Layout, block: Block, sums: tuple[int, int]) -> tuple[float, float]:
        """Host seconds of starting the collectives, forward and backward."""
        ahead = back = 0.0
        if layout.tp > 1:
            each = _PAIRS if layout.sequence_parallel else 1
            ahead, back = float(sums[0] * each), float(sums[1] * each)
        if not kept_gathered(layout):
            ahead, back = ahead + 1, back + 2
        if layout.cp > 1 and block.attention:
            ahead, back = ahead + layout.cp, back + layout.cp
        if layout.ep > 1 and block.experts:
            ahead, back = ahead + _PAIRS, back + _PAIRS
        back += ahead * self._repeated(layout, block)
        return ahead * self.collective_start, back * self.collective_start


@dataclass(frozen=True)
class _ExchangeSeconds:
    """What a micro-batch through a block moves between ranks, nothing hidden. `sums` are those over tensor-parallel
    ranks, forward and backward, and `tensor` their seconds; the block is kept, so that its id stays its own."""

    block: Block
    sums: tuple[int, int]
    tensor: tuple[float, float]
    context: float
    experts: float


def tensor_sums(block: Block) -> tuple[int, int]:
    """Sums over tensor-parallel ranks that a block needs, forward and backward.

    A parameter split by its inner axis leaves partial sums to add, and so does a split table of embeddings; each has
    its mirror backward. A block split by outer axes alone (the head) has only the mirror.
    """
    matrices = [p.axes for p in block.parameters if len(p.axes) >= 2]
    inner = sum(axis_split(axes[-1]) for axes in matrices)
    if block.experts:  # those of all tokens' and the chosen experts' feed-forwards are added up together
        inner = min(inner, 2)
    outer = sum(axis_split(axes[-2]) for axes in matrices)
    ahead = inner + (1 if outer and not block.products else 0)
    back = inner if inner else (1 if outer and block.products else 0)
    return ahead, back
