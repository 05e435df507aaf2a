"""How a framework runs a layout: what it keeps in which precision, what it overlaps, fuses and reduces, what it offers.

Two frameworks that are told the same layout do different work. One row of `FRAMEWORKS` says what each does; the time
and memory models read the row and nothing else. Sources: the frameworks' public documentation and code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.layout import Layout

DIMENSIONS = ("dp", "shard", "tp", "pp", "vpp", "cp", "ep", "sequence_parallel")


@dataclass(frozen=True)
class Offers:
    """What a framework can be asked for: Layout fields that may leave their default, schedules, recompute words.

    `sequence_always`: tensor parallelism comes with sequence parallelism, or (`sequence_with_experts`) does where
    experts are spread too. `shards_context`: weights are sharded over the context-parallel ranks at least.
    `spreads_optimizer`: the optimizer's state can be spread over the data-parallel ranks while weights are whole
    (distributed optimizer, ZeRO 1), which a plan always asks for; weights too (Megatron's FSDP, ZeRO 3) are sharded
    only over all data-parallel ranks at once and without a pipeline. `experts_in_shard`: experts are spread over ranks
    that share the weights out, so shard is a multiple of ep. `tensor_in_pipeline`: tp and pp go together.
    """

    fields: frozenset[str]
    schedules: tuple[str, ...]
    recompute: tuple[str, ...] = ("none", "selective", "full")
    offload: bool = False
    spreads_optimizer: bool = False
    sequence_always: bool = False
    sequence_with_experts: bool = False
    shards_context: bool = False
    experts_in_shard: bool = False
    tensor_in_pipeline: bool = True


#: Two of torch's handles to cuBLAS (forward and backward threads) and one of Transformer Engine, 32 MiB each on
#: devices since Hopper: what both ask for in their public code.
_TE_WORKSPACE = 3 * 32 * 2**20
_MEGATRON = Offers(
    frozenset(DIMENSIONS), ("1f1b", "interleaved"), offload=True, spreads_optimizer=True, sequence_with_experts=True
)


def kept_gathered(layout: Layout) -> bool:
    """Whether a stage's weights stay gathered through the step: replicated ones do, and those of a pipeline."""
    return layout.shard == 1 or layout.pp > 1


@dataclass(frozen=True)
class Framework:
    """One framework's conventions.

    Bytes are per parameter; `gradient_wire_bytes` 0 means the compute precision's. `optimizer_shard` is "dp" where the
    optimizer's state is spread over the data-parallel ranks though the weights are whole (distributed optimizer, ZeRO
    1), else "none".
    Shares are between 0 and 1: of communication that may run behind compute.
    `attention` is "flash" (FlashAttention 2), "best" (the device's own fused kernel) or "unfused" (scores are written).
    `selective` is what recompute = selective drops: "attention" (the core of it), "block" (every other block) or
    "operations" (everything but matrix products, every second of which is kept).
    """

    name: str
    offers: Offers
    attention: str = "flash"
    fused: str = "none"  # how far memory-bound operations are joined: "none", "kernels" (hand-written), "compiled"
    fused_cross_entropy: bool = False
    gradient_wire_bytes: int = 0
    accumulate_bytes: float = 6.0  # moved per parameter to add a micro-batch's gradients, apart from products
    copy_bytes: float = 0.0  # moved per parameter each time that sharded weights are gathered, beside the wire
    gradient_overlap: float = 0.0  # share of the reduction of gradients that may hide behind the last backward
    gather_overlap: float = 0.0  # share of the gathering of weights that may hide behind compute
    tensor_overlap: float = 0.0  # share of tensor-parallel collectives hidden behind the products beside them
    context_overlap: float = 0.8  # share of passing keys and values on hidden behind attention
    scatters_transfers: bool = False  # tensor ranks each send a part to the next stage, which gathers them
    pipeline_overlap: bool = False  # transfers between stages run beside compute
    optimizer_shard: str = "none"
    reads_ahead: bool = True  # processes of their own read the next batch while this one is computed
    loss_scaling: bool = False  # fp16 runs check gradients for overflow and unscale them
    selective: str = "attention"
    activation_offload: bool = False
    head_balanced: bool = False  # stages are cut by cost (ours); else equal counts of layers
    # what it holds in memory (plan/cost/memory.py)
    holds: str = "masters"  # fp32 weights, sharded, and a passing copy; or "copies": whole, in the compute precision
    gradient_bytes: int = 4  # of the buffer that "copies" gather gradients in; 0 means the compute precision's
    reduces_each: bool = False  # sharded gradients are reduced after every micro-batch, so never whole
    loss_rows: int = 0  # rows of logits that the loss turns into fp32 at a time (nn/loss.py); 0: see the card
    batch_bytes: int = 0  # of a token of a rank's share of the batch, which each stage has: ids, positions, targets
    buffers_each: bool = False  # a pipeline keeps a buffer for each micro-batch that it receives (torch's)
    dummy_gradients: bool = False  # Transformer Engine keeps an empty gradient of every shape of matrix
    splits_experts: bool = True  # tensor parallelism splits experts too
    vocab_multiple: int = 1  # a vocabulary is padded to a multiple of this x tp
    workspace_bytes: int = 0  # of the libraries that multiply matrices, inside the allocator
    never_recomputed: frozenset[str] = frozenset({"embedding", "head", "mtp"})  # kinds of block that always keep
    assumed: tuple[str, ...] = field(default=())

    def reduces_in_blocks(self, layout: Layout) -> bool:
        """Whether each block's gradients are reduced as its backward ends, after every micro-batch."""
        return self.reduces_each and not kept_gathered(layout)

    @property
    def planned(self) -> Framework:
        """As a plan asks for it: with the optimizer's state spread where that can be."""
        return replace(self, optimizer_shard="dp") if self.offers.spreads_optimizer else self

    def with_software(self, words: Mapping[str, object]) -> Framework:
        """This framework with the options a case names: `compile`, `fused_cross_entropy`, `activation_offload`,
        `async_tp`; a word that we do not know is listed under `assumed`."""
        changes: dict[str, object] = {}
        assumed = list(self.assumed)
        for word, value in words.items():
            if word == "framework":
                continue
            if word == "compile":
                changes["fused"] = "compiled" if value else self.fused
            elif word in ("fused_cross_entropy", "activation_offload"):
                changes[word] = bool(value)
            elif word == "async_tp":
                changes["tensor_overlap"] = 0.6 if value else self.tensor_overlap
            else:
                assumed.append(f"software.{word} is not a word we know: ignored")
        return replace(self, **changes, assumed=tuple(assumed))  # type: ignore[arg-type]


_ROWS = (
    Framework(
        name="meshwright",
        copy_bytes=4.0,
        reads_ahead=False,
        offers=Offers(frozenset({"dp", "shard", "tp", "pp", "sequence_parallel"}), ("gpipe", "1f1b")),
        gradient_wire_bytes=4,
        gradient_overlap=0.8,
        gather_overlap=0.8,
        selective="attention",
        head_balanced=True,
        never_recomputed=frozenset(),
        loss_rows=1024,
        batch_bytes=24,
        buffers_each=True,
    ),
    Framework(
        name="megatron-lm",
        attention="best",  # Transformer Engine prefers cuDNN's from Hopper on
        accumulate_bytes=0.0,  # fused into the product that gives them
        scatters_transfers=True,
        offers=_MEGATRON,
        fused="kernels",
        gradient_wire_bytes=4,
        gradient_overlap=0.0,
        optimizer_shard="none",
        loss_scaling=True,
        holds="copies",
        dummy_gradients=True,
        vocab_multiple=128,
        workspace_bytes=_TE_WORKSPACE,
    ),
    Framework(
        name="megatron-deepspeed",
        scatters_transfers=True,
        offers=replace(_MEGATRON, schedules=("1f1b",)),
        attention="unfused",
        fused="kernels",
        loss_scaling=True,
        holds="copies",
        gradient_bytes=0,
        vocab_multiple=128,
    ),
    Framework(
        name="megatron-bridge",
        accumulate_bytes=0.0,  # fused into the product that gives them
        scatters_transfers=True,
        offers=replace(_MEGATRON, sequence_always=True),
        attention="best",
        fused="kernels",
        fused_cross_entropy=True,
        gradient_wire_bytes=2,
        gradient_overlap=0.9,
        gather_overlap=0.9,
        tensor_overlap=0.6,
        pipeline_overlap=True,
        optimizer_shard="dp",
        holds="copies",
        dummy_gradients=True,
        vocab_multiple=128,
        workspace_bytes=_TE_WORKSPACE,
    ),
    Framework(
        name="torchtitan",
        copy_bytes=4.0,
        offers=Offers(
            frozenset(DIMENSIONS),
            ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"),
            sequence_always=True,
            shards_context=True,
            experts_in_shard=True,
        ),
        buffers_each=True,
        reduces_each=True,
        gradient_wire_bytes=4,
        gradient_overlap=0.9,
        gather_overlap=0.9,
        selective="operations",
    ),
    Framework(
        name="llm-foundry",
        copy_bytes=4.0,
        offers=Offers(frozenset({"dp", "shard"}), (), ("none", "full"), offload=True),
        gradient_overlap=0.9,
        gather_overlap=0.9,
        reduces_each=True,
    ),
    Framework(
        name="deepspeed",
        offers=Offers(
            frozenset({"dp", "shard", "tp", "pp"}),
            ("1f1b",),
            offload=True,
            spreads_optimizer=True,
            tensor_in_pipeline=False,
        ),
        gradient_overlap=0.8,
        gather_overlap=0.8,
        loss_scaling=True,
        holds="copies",
        gradient_bytes=0,
    ),
    Framework(
        name="megascale",
        accumulate_bytes=0.0,  # fused into the product that gives them
        scatters_transfers=True,
        offers=replace(_MEGATRON, sequence_always=True),
        fused="kernels",
        gradient_wire_bytes=4,
        gradient_overlap=0.9,
        gather_overlap=0.9,
        tensor_overlap=0.7,
        pipeline_overlap=True,
        optimizer_shard="dp",
        holds="copies",
        dummy_gradients=True,
        vocab_multiple=128,
        workspace_bytes=_TE_WORKSPACE,
    ),
    Framework(
        name="unknown",
        attention="best",
        accumulate_bytes=0.0,  # fused into the product that gives them
        scatters_transfers=True,
        offers=_MEGATRON,
        fused="kernels",
        gradient_wire_bytes=4,
        gradient_overlap=0.5,
        gather_overlap=0.5,
        assumed=("the framework is not known: conventions of Megatron-LM",),
        holds="copies",
        dummy_gradients=True,
        vocab_multiple=128,
        workspace_bytes=_TE_WORKSPACE,
    ),
)

#: Every framework by name. "nemo" runs Megatron's core as Megatron-Bridge does.
FRAMEWORKS: Mapping[str, Framework] = {
    **{row.name: row for row in _ROWS},
    "nemo": replace(next(row for row in _ROWS if row.name == "megatron-bridge"), name="nemo"),
}


def framework(name: str) -> Framework:
    """The row of `name`. Raises InputError for a name that is not in the table."""
    if name not in FRAMEWORKS:
        raise InputError(
            Problem("command line: --for", f"unknown framework '{name}'", nearest_name(name, list(FRAMEWORKS)))
        )
    return FRAMEWORKS[name]
