"""How a framework runs a layout: what it keeps in which precision, what it overlaps, fuses and reduces, what it offers.

Two frameworks do different work for the same layout. The time and memory models know a framework by its row of
`FRAMEWORKS` alone. Sources: the frameworks' public documentation and code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.layout import Layout

DIMENSIONS = ("dp", "shard", "tp", "pp", "vpp", "cp", "ep", "sequence_parallel")


@dataclass(frozen=True)
class Offers:
    """What a framework offers: Layout fields that may leave their default, schedules, recompute words.

    `sequence_always`: tensor parallelism needs sequence parallelism; `sequence_with_experts`: only beside expert
    parallelism. `shards_context`: weights are sharded over all context-parallel ranks, if at all.
    `spreads_optimizer`: the optimizer's state can be spread over the data-parallel ranks while weights are whole
    (distributed optimizer, ZeRO 1), which a plan always asks for; weights (Megatron's FSDP, ZeRO 3) are then sharded
    only over all data-parallel ranks and without a pipeline. `experts_in_shard`: experts are spread over ranks that
    shard weights, so shard is a multiple of ep. `tensor_in_pipeline`: tp and pp can be combined.
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
#: devices since Hopper, as in their public code.
_TE_WORKSPACE = 3 * 32 * 2**20
_MEGATRON = Offers(
    frozenset(DIMENSIONS), ("1f1b", "interleaved"), offload=True, spreads_optimizer=True, sequence_with_experts=True
)


def weights_stay_gathered(layout: Layout) -> bool:
    """Whether weights stay gathered through the step, as replicated weights and those of a pipeline do."""
    return layout.shard == 1 or layout.pp > 1


@dataclass(frozen=True)
class Framework:
    """One framework's conventions.

    Bytes are per parameter; `gradient_wire_bytes` 0 means the compute precision's. `optimizer_shard` is "dp" where the
    optimizer's state is spread over the data-parallel ranks though the weights are whole (distributed optimizer, ZeRO
    1), else "none".
    An `*_overlap` is the share, 0 to 1, of a communication that may run behind compute.
    `attention` is "flash" (FlashAttention 2), "best" (the device's own fused kernel) or "unfused" (scores are written).
    `selective` is what recompute = selective drops: "attention" (its core), "block" (every other block), "others" (all
    but matrix products and attention) or "operations" (the same, and every second product too).
    """

    name: str
    offers: Offers
    attention: str = "flash"
    fused: str = "none"  # memory-bound operations: "none", "kernels" (fused by hand), "compiled"
    fused_cross_entropy: bool = False
    gradient_wire_bytes: int = 0
    accumulate_bytes: float = 6.0  # moved per parameter to add a micro-batch's gradients, outside products
    copy_bytes: float = 0.0  # copied per parameter each time that sharded weights are gathered
    gradient_overlap: float = 0.0  # reduction of gradients behind the last backward
    gather_overlap: float = 0.0  # gathering of weights behind compute
    tensor_overlap: float = 0.0  # tensor-parallel collectives behind the products beside them
    context_overlap: float = 0.8  # exchange of keys and values behind attention
    scatters_transfers: bool = False  # each tensor rank sends a part to the next stage, which gathers the parts
    pipeline_overlap: bool = False  # transfers between stages run beside compute
    optimizer_shard: str = "none"
    reads_ahead: bool = True  # other processes read the next batch during the step
    loss_scaling: bool = False  # fp16 runs check gradients for overflow and unscale them
    selective: str = "attention"
    style: str = "megatron"  # of a decoder's card: which operations are fused (families/decoder_saved.py)
    legacy_style: str = ""  # the same of its releases of 2022, the last that ran fp16 and dropped attention alone
    biases: bool = True  # in layers whose feed-forward has two matrices
    activation_offload: bool = False
    head_balanced: bool = False  # stages are cut by cost (ours); else equal counts of layers
    # memory (plan/cost/memory.py)
    holds: str = "masters"  # sharded fp32 weights and a temporary copy; or "copies": whole, in the compute precision
    gradient_bytes: int = 4  # of the gradient buffer of "copies"; 0 means the compute precision's
    reduces_each: bool = False  # sharded gradients are reduced after every micro-batch, so they are never whole
    loss_rows: int = 0  # rows of logits that the loss turns into fp32 at a time (nn/loss.py); 0: see the card
    batch_bytes: int = 0  # per token of the batch on each stage: ids, positions, targets
    torch_pipeline: bool = False  # of torch.distributed.pipelining, which keeps a buffer for each micro-batch received
    dummy_gradients: bool = False  # Transformer Engine keeps an empty gradient of every shape of matrix
    splits_experts: bool = True  # by tensor parallelism too
    vocab_multiple: int = 1  # a vocabulary is padded to a multiple of this x tp
    workspace_bytes: int = 0  # of the matrix libraries, inside the allocator
    save_bytes: int = 0  # per parameter, copied to the host by an asynchronous checkpoint and kept between checkpoints
    never_recomputed: frozenset[str] = frozenset({"embedding", "head", "mtp"})  # kinds of block
    assumed: tuple[str, ...] = field(default=())

    def reduces_in_blocks(self, layout: Layout) -> bool:
        """Whether each block's gradients are reduced as its backward ends, after every micro-batch."""
        return self.reduces_each and not weights_stay_gathered(layout)

    @property
    def planned(self) -> Framework:
        """As a plan uses it: with the optimizer's state spread where the framework offers that."""
        return replace(self, optimizer_shard="dp") if self.offers.spreads_optimizer else self

    def with_software(self, words: Mapping[str, object]) -> Framework:
        """This framework with the options of a case: `compile`, `fused_cross_entropy`, `activation_offload`,
        `async_tp`; an unknown word is listed under `assumed`."""
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
                assumed.append(f"software.{word} is unknown: ignored")
        return replace(self, **changes, assumed=tuple(assumed))  # type: ignore[arg-type]


_ROWS = (
    Framework(
        name="meshwright",
        style="plain",
        copy_bytes=4.0,
        reads_ahead=False,
        offers=Offers(frozenset({"dp", "shard", "tp", "pp", "sequence_parallel"}), ("gpipe", "1f1b")),
        gradient_wire_bytes=4,
        gradient_overlap=0.8,
        gather_overlap=0.8,
        head_balanced=True,
        never_recomputed=frozenset(),
        loss_rows=1024,
        batch_bytes=24,
        torch_pipeline=True,
        selective="others",
        save_bytes=12,  # weights and two moments in fp32 (checkpoint/writer.py)
    ),
    Framework(
        name="megatron-lm",
        legacy_style="megatron-legacy",
        attention="best",  # Transformer Engine prefers cuDNN's from Hopper on
        accumulate_bytes=0.0,  # added by the product that computes them
        scatters_transfers=True,
        offers=_MEGATRON,
        fused="kernels",
        gradient_wire_bytes=4,
        loss_scaling=True,
        holds="copies",
        dummy_gradients=True,
        vocab_multiple=128,
        workspace_bytes=_TE_WORKSPACE,
    ),
    Framework(
        name="megatron-deepspeed",
        style="megatron-legacy",
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
        accumulate_bytes=0.0,  # added by the product that computes them
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
        style="titan",
        copy_bytes=4.0,
        offers=Offers(
            frozenset(DIMENSIONS),
            ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"),
            sequence_always=True,
            shards_context=True,
            experts_in_shard=True,
        ),
        torch_pipeline=True,
        reduces_each=True,
        gradient_wire_bytes=4,
        gradient_overlap=0.9,
        gather_overlap=0.9,
        selective="operations",
    ),
    Framework(
        name="llm-foundry",
        style="fsdp",
        biases=False,
        copy_bytes=4.0,
        offers=Offers(frozenset({"dp", "shard"}), (), ("none", "full"), offload=True),
        gradient_overlap=0.9,
        gather_overlap=0.9,
        reduces_each=True,
    ),
    Framework(
        name="deepspeed",
        style="hf",
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
        accumulate_bytes=0.0,  # added by the product that computes them
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
        accumulate_bytes=0.0,  # added by the product that computes them
        scatters_transfers=True,
        offers=_MEGATRON,
        fused="kernels",
        gradient_wire_bytes=4,
        gradient_overlap=0.5,
        gather_overlap=0.5,
        assumed=("the framework is unknown: conventions of Megatron-LM",),
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
