"""Peak bytes of one rank of each stage, split by what they are for.

A framework holds weights in one of two ways (`Framework.holds`):

"masters" (FSDP): fp32 masters and two fp32 moments, split `shard` ways (Micikevicius et al. 2018), and a copy in the
compute precision: of the whole stage where weights stay gathered, else of two blocks at a time.

"copies" (Megatron, ZeRO): weights in the compute precision and a buffer of fp32 gradients, whole on every rank; masters
and moments whole too, or spread over the data-parallel ranks (distributed optimizer; Rajbhandari et al. 2020).

Activations are those that micro-batches leave in each virtual stage (the card's `saved` lists, Korthikanti et al.
2022), counted over the schedule's action lists, plus the working memory of one block's backward. The loss lives only
between the forward and the backward of the last block, so it never adds to another block's backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from meshwright.cluster import Device
from meshwright.layout import Layout
from meshwright.plan.cost.block_memory import ELEMENT_BYTES, BlockBytes, BlockMemory, local_size
from meshwright.plan.pipeline import peak_activation_bytes
from meshwright.plan.pipeline.actions import stage_ranks
from meshwright.plan.pipeline.in_flight import in_flight
from meshwright.plan.rules.frameworks import weights_stay_gathered
from meshwright.plan.workload import Workload

#: A process without a model: libraries on a CPU (resident), context and libraries on a GPU.
PROCESS_BYTES = {"cpu": 450 * 1024**2, "cuda": 900 * 1024**2}
#: Share of a device's memory that a plan may fill; the rest is for the system.
USABLE = {"cpu": 0.9, "cuda": 0.94}
#: What an allocator holds beyond what is allocated: a share of the bytes that come and go, and at most a share of all
#: bytes. On GPUs from eleven public runs of Megatron-LM (0.11 to 0.45, and 0.03 to 0.08), on CPUs from the resident
#: memory of twelve runs of bench/runs/resident.py.
SLACK = {"cpu": (1.0, 0.3), "cuda": (0.3, 0.06)}
#: A CPU process keeps what it frees where this many times its tensors' bytes fit; else it returns it and has no slack.
ROOM_TO_KEEP = 3
MASTER_BYTES, MOMENT_BYTES = 4, 4


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes on a rank of one stage.

    `buffers` are for communication and for the backward of one block; `slack` is reserved by the allocator and unused;
    `process` is outside the allocator: libraries, the device's context. `checkpoint` is the host's copy from which a
    checkpoint is written while training goes on, where host and device share the memory. `start` is what building the
    whole model, before a step needs anything, takes beyond all that.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    slack: int = 0
    process: int = 0
    checkpoint: int = 0
    start: int = 0

    @property
    def allocated(self) -> int:
        """Bytes of tensors: `torch.cuda.max_memory_allocated`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def reserved(self) -> int:
        """Bytes of the allocator: `torch.cuda.max_memory_reserved`."""
        return self.allocated + self.slack

    @property
    def total(self) -> int:
        return self.reserved + self.process + self.checkpoint + self.start

    @property
    def other(self) -> int:
        """All but the model's state and activations."""
        return self.buffers + self.slack + self.process + self.checkpoint + self.start

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def memory_interval(framework: str, kind: str) -> tuple[float, float]:
    """Factors of a predicted peak that bound its 90 % interval on a `kind` of device: ours on CPUs from the resident
    memory of twelve runs (bench/runs/resident.py); all else from the only runs on GPUs, 411 of Megatron-LM
    (bench/published/planner.py), whose newest features the formula does not know."""
    return (0.8, 1.15) if (framework, kind) == ("meshwright", "cpu") else (0.96, 1.4)


def usable_bytes(device: Device) -> int:
    """Bytes of a device that a plan may fill."""
    return int(device.memory_bytes * USABLE[device.kind])


def slack_bytes(device: Device, moving_bytes: int, allocated_bytes: int) -> int:
    """What the allocator reserves beyond `allocated_bytes`, of which `moving_bytes` come and go."""
    of_moving, of_all = SLACK[device.kind]
    if device.kind == "cpu" and ROOM_TO_KEEP * allocated_bytes + PROCESS_BYTES["cpu"] > usable_bytes(device):
        return 0
    return int(min(of_moving * moving_bytes, of_all * allocated_bytes))


@dataclass(frozen=True)
class StageActivations:
    """Bytes of a rank's activations."""

    activations: int  # at their peak
    after_backward: int  # when the first backward has ended
    working: int  # added by the largest backward, beyond the loss, which is freed by then
    loss: int  # added by the forward of the loss
    repeats: bool  # a backward runs before the peak, so gradients exist at the peak
    head: int  # added by the head's backward beside its weight gradients, less the freed logits


@dataclass(frozen=True)
class StageElements:
    """Local elements of a rank's parameters."""

    dense: int
    expert: int
    largest: int  # of the largest block
    distinct: int  # of matrices with distinct names
    head: int  # of the output head
    buffers: int  # bytes of the module's buffers, which every rank holds whole
    saved_buffers: int  # of these, bytes of the persistent ones


#: Pairs of a kind of block and the number of blocks of that kind.
BlockCounts = tuple[tuple[int, int], ...]


class MemoryModel:
    """Memory of layouts of one workload; equal blocks are counted once, and what layouts share is cached."""

    def __init__(self, workload: Workload) -> None:
        self.card, self.framework, self.device = workload.card, workload.framework, workload.cluster.device
        self.width = ELEMENT_BYTES[workload.precision]
        on_host = workload.asynchronous and self.device.kind == "cpu"
        self.save_bytes = workload.framework.save_bytes if on_host else 0
        self.blocks = BlockMemory(workload.framework, workload.precision, self.device)
        self._bytes: dict[tuple[object, ...], tuple[BlockBytes, ...]] = {}
        self._activations: dict[tuple[object, ...], tuple[StageActivations, ...]] = {}
        self._elements: dict[tuple[object, ...], tuple[StageElements, ...]] = {}
        self._counts: dict[tuple[int, ...], tuple[BlockCounts, ...]] = {}
        self._by_rank: dict[tuple[object, ...], tuple[BlockCounts, ...]] = {}
        self._kinds, self._index = self.card.kinds
        tied = {first for first, _ in self.card.tied}
        self._tied = tuple(p for p in self.card.parameters if p.name in tied)

    def stages(self, layout: Layout, firsts: Sequence[int], micro_batches: int) -> tuple[StageMemory, ...]:
        """Memory of a rank of each of `layout.pp` stages; `firsts` is the first block of each virtual stage, in the
        model's order. Raises ValueError where the schedule cannot run `micro_batches`."""
        cut = tuple(firsts)
        ranks = zip(self._stage_elements(layout, cut), self._stage_activations(layout, cut, micro_batches), strict=True)
        if self.framework.holds == "copies":
            return tuple(self._copies(layout, sizes, active) for sizes, active in ranks)
        return tuple(
            self._with_start(self._masters(layout, sizes, active, micro_batches), sizes) for sizes, active in ranks
        )

    def _with_start(self, stage: StageMemory, sizes: StageElements) -> StageMemory:
        """`stage`, and what the start takes beyond it: the whole model, of which each rank keeps its part, and a block
        that is gathered to place its shards. On a GPU the whole model is in the host's memory."""
        if not self.card.built_whole or self.device.kind != "cpu":
            return stage
        whole = MASTER_BYTES * self.card.parameter_elements + sum(block.buffer_bytes for block in self.card.blocks)
        return replace(stage, start=max(0, whole + self.width * sizes.largest + stage.process - stage.total))

    def least_bytes(self, layout: Layout, firsts: Sequence[int], micro_batches: int) -> int:
        """A lower bound of the fullest rank's bytes, for this layout and any larger micro-batch or smaller shard.

        Gradients of "masters" are left out, since fewer micro-batches may need less for them. All else grows with the
        micro-batch: half as many in flight, each twice as large, keep no less.
        """
        if self.framework.holds == "copies":
            return max(stage.total for stage in self.stages(layout, firsts, micro_batches))
        cut, copies = tuple(firsts), 1 if layout.offload else 3
        ranks = zip(self._stage_elements(layout, cut), self._stage_activations(layout, cut, micro_batches), strict=True)
        return PROCESS_BYTES[self.device.kind] + max(
            copies * MASTER_BYTES * self._sharded(layout, sizes)
            + self._gathered(layout, sizes)
            + sizes.buffers
            + active.activations
            for sizes, active in ranks
        )

    def _copies(self, layout: Layout, sizes: StageElements, active: StageActivations) -> StageMemory:
        """Weights in the compute precision and whole gradients; the optimizer whole or spread over data parallelism."""
        framework, wide, data = self.framework, self.width, layout.dp * layout.cp
        elements = sizes.dense + sizes.expert
        gradient = framework.gradient_bytes or wide
        per_parameter = MASTER_BYTES * (wide < MASTER_BYTES) + 2 * MOMENT_BYTES
        if layout.shard > 1:  # ZeRO 3: two blocks at a time are whole
            whole = min(2 * sizes.largest, elements) * (wide + gradient)
            weights, gradients, optimizer = (
                self._sharded(layout, sizes, size) for size in (wide, gradient, per_parameter)
            )
            optimizer = 0 if layout.offload else optimizer
            return self._stage_memory(weights + sizes.buffers, gradients, optimizer, active, whole)
        spread = data if framework.optimizer_shard == "dp" else 1
        spread_experts = max(1, data * layout.tp // (layout.ep * self.blocks.expert_tp(layout))) if spread > 1 else 1
        optimizer = per_parameter * (-(-sizes.dense // spread) + -(-sizes.expert // spread_experts))
        dummies = wide * sizes.distinct if framework.dummy_gradients else 0
        optimizer = 0 if layout.offload else optimizer
        return self._stage_memory(wide * elements + sizes.buffers, gradient * elements, optimizer, active, dummies)

    def _saved(self, layout: Layout, sizes: StageElements) -> int:
        """A rank's bytes of the copy from which checkpoints are written: of what it owns, an equal part of what it
        shares with other replicas. (Owners alternate by parameter, and all processes share the machine's memory.) The
        first rank of a stage owns its buffers."""
        if not self.save_bytes:
            return 0
        return self.save_bytes * -(-self._sharded(layout, sizes) // layout.replicate) + sizes.saved_buffers

    def _gathered(self, layout: Layout, sizes: StageElements) -> int:
        """Bytes of the weights that stay gathered, in the compute precision."""
        return self.width * (sizes.dense + sizes.expert) if weights_stay_gathered(layout) else 0

    def _masters(
        self, layout: Layout, sizes: StageElements, active: StageActivations, micro_batches: int
    ) -> StageMemory:
        """fp32 masters and moments, split; and a copy in the compute precision of all weights, or of two blocks at a
        time. The largest of three moments: the loss of the last micro-batch before any backward; the first backward
        after it; and the later ones, when all gradients exist (whole ones while micro-batches add to them)."""
        elements, wide, data = sizes.dense + sizes.expert, self.width, layout.dp * layout.cp
        own = self._sharded(layout, sizes)
        pair = wide * min(2 * sizes.largest, elements)
        gathered = self._gathered(layout, sizes)
        whole = micro_batches > 1 and not self.framework.reduces_in_blocks(layout)
        gradients = 4 * (elements if whole else own)
        before = gradients if active.repeats else 0
        # A block's gradient in fp32 while it is reduced, and the one before the cast unless it is added to a whole one.
        reduction = sizes.largest * (4 if whole else wide + 4) if data > 1 else 0
        # The head's gradient is freed before that where it is added to those of earlier micro-batches.
        head = sizes.head * (wide if data == 1 else 4 if active.repeats else wide + 4) + active.head
        moments = (
            (gathered, before, active.activations, active.loss),
            (max(gathered, pair), before, active.activations, max(active.working, head)),
            (gathered if layout.pp > 1 else pair, gradients, active.after_backward, max(active.working, reduction)),
        )
        copies, gradients, activations, buffers = max(moments, key=sum)
        optimizer = 0 if layout.offload else 2 * MOMENT_BYTES * own
        peak = replace(active, activations=activations, working=buffers)
        weights, saved = MASTER_BYTES * own + copies + sizes.buffers, self._saved(layout, sizes)
        return self._stage_memory(weights, gradients, optimizer, peak, saved=saved)

    def _stage_memory(
        self,
        weights: int,
        gradients: int,
        optimizer: int,
        active: StageActivations,
        more_buffers: int = 0,
        *,
        saved: int = 0,
    ) -> StageMemory:
        kind = self.device.kind
        buffers = active.working + more_buffers + (self.framework.workspace_bytes if kind == "cuda" else 0)
        allocated = weights + gradients + optimizer + active.activations + buffers
        return StageMemory(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=active.activations,
            buffers=buffers,
            slack=slack_bytes(self.device, active.activations + active.working, allocated + saved),
            process=PROCESS_BYTES[kind],
            checkpoint=saved,
        )

    def _sharded(self, layout: Layout, sizes: StageElements, each: int = 1) -> int:
        """A rank's bytes of what `shard` splits, at `each` per parameter. Only every ep-th rank holds the same experts,
        so they are split over fewer ranks."""
        ways = max(1, layout.shard * layout.tp // (layout.ep * self.blocks.expert_tp(layout)))
        return -(-sizes.dense * each // layout.shard) - (-sizes.expert * each // ways)

    def _block_bytes(self, layout: Layout) -> tuple[BlockBytes, ...]:
        key = _block_key(layout)
        if key not in self._bytes:
            self._bytes[key] = tuple(self.blocks.block_bytes(block, inputs, layout) for block, inputs in self._kinds)
        return self._bytes[key]

    def _stage_activations(
        self, layout: Layout, firsts: tuple[int, ...], micro_batches: int
    ) -> tuple[StageActivations, ...]:
        key = (*_block_key(layout), layout.pp, layout.vpp, layout.schedule, firsts, micro_batches)
        if key not in self._activations:
            kinds = self._block_bytes(layout)
            saved = [sum(count * kinds[k].saved for k, count in stage) for stage in self.counted(firsts)]
            peaks: Sequence[float] = [sum(saved)]
            if layout.pp > 1:
                peaks = peak_activation_bytes(layout.schedule, layout.pp, micro_batches, saved, vpp=layout.vpp)
            ranks: list[StageActivations] = []
            for peak, counts in zip(peaks, self._ranks(layout, firsts), strict=True):
                blocks = [kinds[k] for k, _ in counts]
                loss, working = max(block.loss for block in blocks), max(block.working for block in blocks)
                if self.framework.activation_offload:  # a block's activations move out while the next is computed
                    peak = min(peak, loss + 2 * max(block.saved for block in blocks))
                present = dict(counts)
                last = self._index[-1] in present
                gathered = self._head_buffer(layout) if last else 0
                rows = self._loss_rows(layout) if last else 0
                ends = last + (self._index[0] in present)
                received = (2 - ends) * self._received(layout, micro_batches)
                received += self.framework.batch_bytes * self.card.units_per_sample * micro_batches * layout.micro_batch
                flying = in_flight(layout.schedule, layout.pp, len(ranks), micro_batches, layout.vpp)
                repeats = micro_batches * layout.vpp > flying
                logits = kinds[self._index[-1]].loss // 2 if layout.pp == 1 else 0
                head = 2 * self._boundary(layout) - logits if last else 0
                after = int(peak) * (flying - 1) // flying + received if layout.pp > 1 else 0
                working = max(0, working - loss) + gathered
                ranks.append(StageActivations(int(peak) + received, after, working, rows, repeats, head))
            self._activations[key] = tuple(ranks)
        return self._activations[key]

    def _head_buffer(self, layout: Layout) -> int:
        """Bytes of the permanent buffer in which Megatron gathers the output head's split input."""
        if not layout.sequence_parallel or self.framework.holds != "copies":
            return 0
        return self._boundary(layout)

    def _boundary(self, layout: Layout) -> int:
        """Bytes of a micro-batch between two blocks, not split over tensor parallelism."""
        return self._kinds[-1][1] * self.width * layout.micro_batch // layout.cp

    def _received(self, layout: Layout, micro_batches: int) -> int:
        """Bytes received from one neighbour stage: torch's pipelines keep a buffer for every micro-batch."""
        if layout.pp == 1 or not self.framework.torch_pipeline:
            return 0
        return micro_batches * self._boundary(layout) // (layout.tp if layout.sequence_parallel else 1)

    def _loss_rows(self, layout: Layout) -> int:
        """Bytes of the rows of logits that the loss has in fp32 at a time: their softmax, a copy if the logits are not
        fp32, and the softmax of the previous rows."""
        rows, tokens = self.framework.loss_rows, self.card.units_per_sample * layout.micro_batch // layout.cp
        columns = self.card.blocks[-1].output_elements // max(self.card.units_per_sample, 1) // layout.tp
        return 4 * min(rows, tokens) * columns * (1 + (self.width < 4) + (tokens > rows))

    def _stage_elements(self, layout: Layout, firsts: tuple[int, ...]) -> tuple[StageElements, ...]:
        key = (layout.tp, layout.ep, layout.pp, layout.vpp, layout.schedule, firsts)
        if key not in self._elements:
            kinds = self._block_bytes(layout)
            tied = sum(local_size(p, layout.tp, 1, self.framework.vocab_multiple) for p in self._tied)
            first, last = self._index[0], self._index[-1]
            ranks = []
            for counts in self._ranks(layout, firsts):
                blocks = [k for k, _ in counts]
                # A rank without the embedding has a copy of it for a tied head, or for a layer that embeds a further
                # token to predict it.
                alias = 0
                if first not in blocks:
                    further = any(self._kinds[k][0].kind == "mtp" for k in blocks)
                    alias = kinds[first].dense if further else tied if last in blocks else 0
                distinct = {name: size for k in blocks for name, size in kinds[k].matrices}
                ranks.append(
                    StageElements(
                        sum(count * kinds[k].dense for k, count in counts) + alias,
                        sum(count * kinds[k].expert for k, count in counts),
                        max(alias, *(kinds[k].dense + kinds[k].expert for k in blocks)),
                        sum(distinct.values()) + (tied if last in blocks else 0),
                        kinds[last].dense + tied if last in blocks else 0,
                        sum(count * self._kinds[k][0].buffer_bytes for k, count in counts),
                        sum(count * self._kinds[k][0].saved_buffer_bytes for k, count in counts),
                    )
                )
            self._elements[key] = tuple(ranks)
        return self._elements[key]

    def counted(self, firsts: tuple[int, ...]) -> tuple[BlockCounts, ...]:
        """The number of blocks of each kind in every virtual stage, the kinds in order."""
        if firsts not in self._counts:
            spans = (self._index[a:b] for a, b in zip(firsts, (*firsts[1:], len(self._index)), strict=True))
            self._counts[firsts] = tuple(tuple(sorted(Counter(span).items())) for span in spans)
        return self._counts[firsts]

    def _ranks(self, layout: Layout, firsts: tuple[int, ...]) -> tuple[BlockCounts, ...]:
        """The number of blocks of each kind on every rank, the kinds in order."""
        key = (layout.pp, layout.vpp, layout.schedule, firsts)
        if key not in self._by_rank:
            stages = self.counted(firsts)
            ranks = stage_ranks(layout.schedule, layout.pp, layout.vpp) if layout.pp > 1 else (0,) * len(stages)
            sums: list[Counter[int]] = [Counter() for _ in range(layout.pp)]
            for stage, rank in zip(stages, ranks, strict=True):
                sums[rank].update(dict(stage))
            self._by_rank[key] = tuple(tuple(sorted(counts.items())) for counts in sums)
        return self._by_rank[key]


def _block_key(layout: Layout) -> tuple[object, ...]:
    """The part of a layout that the memory of a block depends on."""
    return (layout.tp, layout.cp, layout.ep, layout.sequence_parallel, layout.micro_batch, layout.recompute)
