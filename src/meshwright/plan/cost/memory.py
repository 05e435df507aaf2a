"""Bytes that one rank of each stage holds at its worst moment, split by what they are for.

A framework holds weights in one of two ways (`Framework.holds`):

"masters" (FSDP): fp32 masters and two fp32 moments, split `shard` ways (Micikevicius et al. 2018), and beside them a
copy in the compute precision: of the whole stage where it is kept gathered, else of two blocks at a time.

"copies" (Megatron, ZeRO): weights in the compute precision and a buffer of fp32 gradients, whole on every rank; masters
and moments whole too, or spread over the data-parallel ranks (distributed optimizer; Rajbhandari et al. 2020).

Activations are what each virtual stage's micro-batches leave behind (the card's `saved` lists, Korthikanti et al.
2022), counted over the schedule's own action lists, plus what the backward of one block needs while it runs. The loss
lives only between the forward and the backward of the last block: it and a block's backward are never there together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from meshwright.cluster import Device
from meshwright.layout import Layout
from meshwright.plan.cost.block_memory import WIDTH, BlockBytes, BlockMemory, local_size
from meshwright.plan.pipeline import held_bytes
from meshwright.plan.pipeline.actions import places
from meshwright.plan.pipeline.in_flight import in_flight
from meshwright.plan.rules.frameworks import kept_gathered
from meshwright.plan.workload import Workload

#: What a process holds before it has a model: libraries on a CPU (resident), context and libraries on a GPU.
PROCESS_BYTES = {"cpu": 450 * 1024**2, "cuda": 900 * 1024**2}
#: Share of a device's memory that a plan may fill; the rest is for the system.
USABLE = {"cpu": 0.9, "cuda": 0.94}
#: What a caching allocator holds besides, in blocks that nothing fits into: a share of what comes and goes, at most one
#: of all that is allocated. The middle of what eleven public runs of Megatron-LM reserved beyond what they allocated
#: (0.11 to 0.45, and 0.03 to 0.08). malloc gives back.
SLACK = {"cpu": 0.0, "cuda": 0.3}
MOST_SLACK = 0.06
MASTER_BYTES, MOMENT_BYTES = 4, 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one stage at its worst moment.

    `buffers` are for communication and for the backward of one block; `slack` is what the allocator holds and cannot
    use; `process` is outside its sight: libraries, the device's context.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    slack: int = 0
    process: int = 0

    @property
    def allocated(self) -> int:
        """What tensors take: `torch.cuda.max_memory_allocated`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def reserved(self) -> int:
        """What the allocator takes for them: `torch.cuda.max_memory_reserved`."""
        return self.allocated + self.slack

    @property
    def total(self) -> int:
        return self.reserved + self.process

    @property
    def other(self) -> int:
        """What is no state of the model and no activation."""
        return self.buffers + self.slack + self.process

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def memory_interval(framework: str) -> tuple[float, float]:
    """Factors of a predicted peak that bound its 90 % interval: of ours from 61 layouts really run
    (bench/runs/memory.py), of others from 411 runs of Megatron-LM (bench/published/planner.py), whose newest features
    the formula does not know."""
    return (0.96, 1.03) if framework == "meshwright" else (0.96, 1.4)


def usable_bytes(device: Device) -> int:
    """Bytes of a device that a plan may fill."""
    return int(device.memory_bytes * USABLE[device.kind])


def slack_bytes(kind: str, moving_bytes: int, allocated_bytes: int) -> int:
    """What a kind of device's allocator holds beside `allocated_bytes`, of which `moving_bytes` come and go."""
    return int(min(SLACK[kind] * moving_bytes, MOST_SLACK * allocated_bytes))


@dataclass(frozen=True)
class StageActivations:
    """Bytes of activations that a rank holds at its worst moment and (`left`) when its first backward has ended, and
    what is added to them by its largest backward (beyond the loss, which is then gone) and by the forward of its loss.
    `repeats`: backwards went before the worst moment, so that gradients are there. `head` is what the head's own
    backward adds beside its weights' gradient, less the logits, which are gone by then."""

    activations: int
    left: int
    working: int
    loss: int
    repeats: bool
    head: int


@dataclass(frozen=True)
class StageElements:
    """Local elements of a rank's parameters: dense, of experts, of its largest block, of matrices of distinct name, of
    the output head."""

    dense: int
    expert: int
    largest: int
    distinct: int
    head: int


#: Kinds of block with how many there are of each.
BlockCounts = tuple[tuple[int, int], ...]


class MemoryModel:
    """Memory of layouts of one workload; equal blocks are counted once, shared parts remembered."""

    def __init__(self, workload: Workload) -> None:
        card, framework, precision, device = (
            workload.card, workload.framework, workload.precision, workload.cluster.device,
        )  # fmt: skip
        self.card, self.framework, self.precision, self.device = card, framework, precision, device
        self.width, self.blocks = WIDTH[precision], BlockMemory(framework, precision, device)
        self._bytes: dict[tuple[object, ...], tuple[BlockBytes, ...]] = {}
        self._held: dict[tuple[object, ...], tuple[StageActivations, ...]] = {}
        self._sizes: dict[tuple[object, ...], tuple[StageElements, ...]] = {}
        self._counts: dict[tuple[int, ...], tuple[BlockCounts, ...]] = {}
        self._by_rank: dict[tuple[object, ...], tuple[BlockCounts, ...]] = {}
        self._kinds, self._index = card.kinds
        shared = {first for first, _ in card.tied}
        self._tied = tuple(p for p in card.parameters if p.name in shared)

    def stages(self, layout: Layout, firsts: Sequence[int], micro_batches: int) -> tuple[StageMemory, ...]:
        """Memory of a rank of each of `layout.pp` stages; `firsts` is the first block of each virtual stage, in the
        model's order. Raises ValueError where the schedule cannot run so many micro-batches."""
        cut = tuple(firsts)
        sizes, held = self._stage_sizes(layout, cut), self._stage_held(layout, cut, micro_batches)
        ranks = zip(sizes, held, strict=True)
        if self.framework.holds == "copies":
            return tuple(self._copies(layout, own, active) for own, active in ranks)
        return tuple(self._masters(layout, own, active, micro_batches) for own, active in ranks)

    def least_bytes(self, layout: Layout, firsts: Sequence[int], micro_batches: int) -> int:
        """What the fullest rank holds at least, whatever larger micro-batches, or a smaller shard, the same layout has.

        Gradients of "masters" are left out: they take less where fewer micro-batches add theirs up. All else grows with
        the micro-batch: with half as many in flight, each twice as large, no less is kept.
        """
        if self.framework.holds == "copies":
            return max(stage.total for stage in self.stages(layout, firsts, micro_batches))
        cut, moments = tuple(firsts), 1 if layout.offload else 3
        ranks = zip(self._stage_sizes(layout, cut), self._stage_held(layout, cut, micro_batches), strict=True)
        return PROCESS_BYTES[self.device.kind] + max(
            moments * MASTER_BYTES * self._sharded(layout, own) + self._copied(layout, own) + active.activations
            for own, active in ranks
        )

    def _copies(self, layout: Layout, sizes: StageElements, held: StageActivations) -> StageMemory:
        """Weights in the compute precision and whole gradients; the optimizer whole or spread over data parallelism."""
        own, wide, data = self.framework, self.width, layout.dp * layout.cp
        everything = sizes.dense + sizes.expert
        gradient = own.gradient_bytes or wide
        per_parameter = MASTER_BYTES * (wide < MASTER_BYTES) + 2 * MOMENT_BYTES
        if layout.shard > 1:  # ZeRO 3: two blocks at a time are whole
            passing = min(2 * sizes.largest, everything) * (wide + gradient)
            weights, gradients, optimizer = (
                self._sharded(layout, sizes, size) for size in (wide, gradient, per_parameter)
            )
            return self._sum(weights, gradients, 0 if layout.offload else optimizer, held, passing)
        spread = data if own.optimizer_shard == "dp" else 1
        spread_experts = max(1, data * layout.tp // (layout.ep * self.blocks.expert_tp(layout))) if spread > 1 else 1
        optimizer = per_parameter * (-(-sizes.dense // spread) + -(-sizes.expert // spread_experts))
        dummies = wide * sizes.distinct if own.dummy_gradients else 0
        return self._sum(wide * everything, gradient * everything, 0 if layout.offload else optimizer, held, dummies)

    def _copied(self, layout: Layout, sizes: StageElements) -> int:
        """Bytes of the weights that stay gathered, in the compute precision."""
        return self.width * (sizes.dense + sizes.expert) if kept_gathered(layout) else 0

    def _masters(self, layout: Layout, sizes: StageElements, held: StageActivations, micro_batches: int) -> StageMemory:
        """fp32 masters and moments, split; beside them a copy in the compute precision of all, or of two blocks at a
        time. The worst of three moments: the loss of the last micro-batch that comes before any backward, the first
        backward after it, and from then on, when every gradient is there: whole, while micro-batches add theirs up."""
        elements, wide, data = sizes.dense + sizes.expert, self.width, layout.dp * layout.cp
        own = self._sharded(layout, sizes)
        pair = wide * min(2 * sizes.largest, elements)
        copied = self._copied(layout, sizes)
        whole = micro_batches > 1 and not self.framework.reduces_in_blocks(layout)
        gradients = 4 * (elements if whole else own)
        before = gradients if held.repeats else 0
        # A block's gradient while it is reduced, in fp32, and before that where it is not among those added up.
        passing = sizes.largest * (4 if whole else wide + 4) if data > 1 else 0
        # The head's is given back before that where it is added to those of the micro-batches before.
        head = sizes.head * (wide if data == 1 else 4 if held.repeats else wide + 4) + held.head
        moments = (
            (copied, before, held.activations, held.loss),
            (max(copied, pair), before, held.activations, max(held.working, head)),
            (copied if layout.pp > 1 else pair, gradients, held.left, max(held.working, passing)),
        )
        copies, gradients, activations, buffers = max(moments, key=sum)
        optimizer = 0 if layout.offload else 2 * MOMENT_BYTES * own
        now = replace(held, activations=activations, working=buffers)
        return self._sum(MASTER_BYTES * own + copies, gradients, optimizer, now)

    def _sum(
        self, weights: int, gradients: int, optimizer: int, held: StageActivations, passing: int = 0
    ) -> StageMemory:
        kind = self.device.kind
        buffers = held.working + passing + (self.framework.workspace_bytes if kind == "cuda" else 0)
        allocated = weights + gradients + optimizer + held.activations + buffers
        return StageMemory(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=held.activations,
            buffers=buffers,
            slack=slack_bytes(kind, held.activations + held.working, allocated),
            process=PROCESS_BYTES[kind],
        )

    def _sharded(self, layout: Layout, sizes: StageElements, each: int = 1) -> int:
        """Bytes, at `each` a parameter, of a rank's part of what is split by `shard`. Experts lie on every ep-th rank
        only, so that there are fewer ranks to split each of them over."""
        ways = max(1, layout.shard * layout.tp // (layout.ep * self.blocks.expert_tp(layout)))
        return -(-sizes.dense * each // layout.shard) - (-sizes.expert * each // ways)

    def _block_bytes(self, layout: Layout) -> tuple[BlockBytes, ...]:
        key = _block_key(layout)
        if key not in self._bytes:
            self._bytes[key] = tuple(self.blocks.of(block, given, layout) for block, given in self._kinds)
        return self._bytes[key]

    def _stage_held(self, layout: Layout, firsts: tuple[int, ...], micro_batches: int) -> tuple[StageActivations, ...]:
        key = (*_block_key(layout), layout.pp, layout.vpp, layout.schedule, firsts, micro_batches)
        if key not in self._held:
            kinds = self._block_bytes(layout)
            kept = [sum(count * kinds[k].kept for k, count in stage) for stage in self.counted(firsts)]
            held: Sequence[float] = kept if layout.pp > 1 else [sum(kept)]
            if layout.pp > 1:
                held = held_bytes(layout.schedule, layout.pp, micro_batches, kept, vpp=layout.vpp)
            ranks: list[StageActivations] = []
            for most, mine in zip(held, self._ranks(layout, firsts), strict=True):
                blocks = [k for k, _ in mine]
                loss, working = (max(f(kinds[k]) for k in blocks) for f in (_loss, _working))
                if self.framework.activation_offload:  # a block's are on their way out while the next is computed
                    most = min(most, loss + 2 * max(kinds[k].kept for k in blocks))
                last = self._index[-1] in blocks
                gathered = self._gathered(layout) if last else 0
                rows = self._loss_rows(layout) if last else 0
                ends = last + (self._index[0] in blocks)
                received = (2 - ends) * self._received(layout, micro_batches)
                received += self.framework.batch_bytes * self.card.units_per_sample * micro_batches * layout.micro_batch
                flying = in_flight(layout.schedule, layout.pp, len(ranks), micro_batches, layout.vpp)
                repeats = micro_batches * layout.vpp > flying
                gone = kinds[self._index[-1]].loss // 2 if layout.pp == 1 else 0
                head = 2 * self._entry(layout) - gone if last else 0
                left = int(most) * (flying - 1) // flying + received if layout.pp > 1 else 0
                ranks.append(
                    StageActivations(int(most) + received, left, max(0, working - loss) + gathered, rows, repeats, head)
                )
            self._held[key] = tuple(ranks)
        return self._held[key]

    def _gathered(self, layout: Layout) -> int:
        """Bytes of the buffer, kept for good, in which Megatron gathers the output head's split input."""
        if not layout.sequence_parallel or self.framework.holds != "copies":
            return 0
        return self._entry(layout)

    def _entry(self, layout: Layout) -> int:
        """Bytes of a micro-batch as it goes from block to block, not split over tensor parallelism."""
        return self._kinds[-1][1] * self.width * layout.micro_batch // layout.cp

    def _received(self, layout: Layout, micro_batches: int) -> int:
        """Bytes of what a stage receives from one neighbour: torch's pipelines keep a buffer for every micro-batch."""
        if layout.pp == 1 or not self.framework.buffers_each:
            return 0
        return micro_batches * self._entry(layout) // (layout.tp if layout.sequence_parallel else 1)

    def _loss_rows(self, layout: Layout) -> int:
        """Bytes of the rows of logits that the loss has in fp32 at a time: a copy where they are not fp32, their
        softmax, and the softmax of the rows before."""
        rows, tokens = self.framework.loss_rows, self.card.units_per_sample * layout.micro_batch // layout.cp
        columns = self.card.blocks[-1].output_elements // max(self.card.units_per_sample, 1) // layout.tp
        return 4 * min(rows, tokens) * columns * (1 + (self.width < 4) + (tokens > rows))

    def _stage_sizes(self, layout: Layout, firsts: tuple[int, ...]) -> tuple[StageElements, ...]:
        key = (layout.tp, layout.ep, layout.pp, layout.vpp, layout.schedule, firsts)
        if key not in self._sizes:
            kinds = self._block_bytes(layout)
            table = self.framework.vocab_multiple
            tied = sum(local_size(p, layout.tp, 1, table) for p in self._tied)
            first, last = self._index[0], self._index[-1]
            ranks = []
            for mine in self._ranks(layout, firsts):
                blocks = [k for k, _ in mine]
                # Where the ends are on different ranks, the alias of a tied embedding is a copy of its own, and a layer
                # that predicts a further token has a copy to embed it with.
                alias = 0
                if first not in blocks:
                    further = any(self._kinds[k][0].kind == "mtp" for k in blocks)
                    alias = kinds[first].dense if further else tied if last in blocks else 0
                distinct = {name: size for k in blocks for name, size in kinds[k].matrices}
                ranks.append(
                    StageElements(
                        sum(count * kinds[k].dense for k, count in mine) + alias,
                        sum(count * kinds[k].expert for k, count in mine),
                        max(alias, *(kinds[k].dense + kinds[k].expert for k in blocks)),
                        sum(distinct.values()) + (tied if last in blocks else 0),
                        kinds[last].dense + tied if last in blocks else 0,
                    )
                )
            self._sizes[key] = tuple(ranks)
        return self._sizes[key]

    def counted(self, firsts: tuple[int, ...]) -> tuple[BlockCounts, ...]:
        """How many blocks of each kind every virtual stage has, the kinds in order."""
        if firsts not in self._counts:
            spans = (self._index[a:b] for a, b in zip(firsts, (*firsts[1:], len(self._index)), strict=True))
            self._counts[firsts] = tuple(tuple(sorted(Counter(span).items())) for span in spans)
        return self._counts[firsts]

    def _ranks(self, layout: Layout, firsts: tuple[int, ...]) -> tuple[BlockCounts, ...]:
        """The same of every rank."""
        key = (layout.pp, layout.vpp, layout.schedule, firsts)
        if key not in self._by_rank:
            stages = self.counted(firsts)
            home = places(layout.schedule, layout.pp, layout.vpp) if layout.pp > 1 else (0,) * len(stages)
            ranks: list[Counter[int]] = [Counter() for _ in range(layout.pp)]
            for stage, rank in zip(stages, home, strict=True):
                ranks[rank].update(dict(stage))
            self._by_rank[key] = tuple(tuple(sorted(rank.items())) for rank in ranks)
        return self._by_rank[key]


def _loss(block: BlockBytes) -> int:
    return block.loss


def _working(block: BlockBytes) -> int:
    return block.working


def _block_key(layout: Layout) -> tuple[object, ...]:
    """What the memory of a block depends on."""
    return (layout.tp, layout.cp, layout.ep, layout.sequence_parallel, layout.micro_batch, layout.recompute)
