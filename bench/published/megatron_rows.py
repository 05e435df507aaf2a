"""Predicts the peak memory of Megatron-LM's own regression runs, from a table of ours outside the repository.

The table has the options of each run and two counters of torch's allocator; a blank is the framework's default. The
name of a case says what it tests beside the columns: `te` or not, rope, untied, MLA. The public configuration of the
regression suite gives what runs share: vocabularies, dropout of 0.1, 8 GPUs by default, the attention of deterministic
runs. The counters are of the last rank of the last stage, which writes the logs. No constant is fitted: every figure
follows from `plan.cost.memory`.

    python bench/published/megatron_rows.py --data FOLDER
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.cluster import named_cluster
from meshwright.families.decoder import DecoderShape, card
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.cost import MemoryModel, StageMemory
from meshwright.plan.rules import FRAMEWORKS, Framework

MIB = 2**20
DEVICES = {"a100": "a100-sxm-80gb", "h100": "h100-sxm-80gb", "gb200": "gb200", "": "a100-sxm-80gb"}
#: Models without a card in the planner (state-space hybrids, encoders beside decoders), and runs of other kinds
#: (post-training, offloading of activations by module).
NOT_DECODERS = ("hybrid", "mimo", "nemotron", "t5")
OTHER_RUNS = ("grpo", "distill", "fine_grained_offloading")
#: Entries of the tokenizers that the suite uses.
VOCABULARY = {"bert": 30522, "15b": 256000, "gpt3_7b": 131073, "8x22b": 32000, "8x7b": 256000, "deepseek": 256000}
GPT2_VOCABULARY = 50257
#: Cases of DeepSeek-V3's architecture -> widths of an expert and of the shared one, layers before the first mixture.
LATENT_MIXTURES = {"deepseekv3": (2048, 3), "ep4_etp1_mtp": (1024, 1)}
#: Pipelines that the configuration lays out by hand: (case, pp) -> first block of each virtual stage.
PIPELINES = {
    ("deepseekv3", 4): (0, 3, 5, 7, 9, 11, 13, 14),
    ("deepseekv3", 2): (0, 8),
    ("uneven_pipeline", 4): (0, 3, 7, 11),
    ("account_for_embedding", 4): tuple(range(8)),  # the two ends count as layers
}
#: Gradients of the logits whose products a run defers to idle time at the end of a step.
DEFERRED = 2


@dataclass(frozen=True)
class MegatronRow:
    """A measured run: its options, and bytes that torch's allocator counted, between steps and at the peak."""

    case: str
    golden: str
    options: Mapping[str, str]
    allocated_bytes: int
    max_allocated_bytes: int

    def number(self, column: str, otherwise: int) -> int:
        return int(self.options[column]) if self.options[column] else otherwise

    def says(self, *words: str) -> bool:
        return any(word in self.case for word in words)


@dataclass(frozen=True)
class Unsupported:
    """A row that the planner cannot predict, and why."""

    case: str
    why: str


def read_megatron_rows(path: Path) -> Iterator[MegatronRow]:
    """Measured rows. Raises OSError or KeyError for a file that is not the table."""
    with open(path, newline="", encoding="utf-8") as file:
        for options in csv.DictReader(file):
            if options["mem_max_allocated_bytes"]:
                measured = (int(options[f"mem_{name}_bytes"] or 0) for name in ("allocated", "max_allocated"))
                yield MegatronRow(options["case"], options["golden"], options, *measured)


def predicted(row: MegatronRow) -> StageMemory | Unsupported:
    """Memory of the rank whose counters the suite logs."""
    if row.case.split("/")[0] in NOT_DECODERS or row.says(*OTHER_RUNS):
        return Unsupported(row.case, "not a decoder that the planner has a card for")
    layout = _layout(row)
    cluster = named_cluster(DEVICES[row.options["gpu"]], 8)
    shape, framework = _shape(row, layout), _framework(row, layout)
    precision = "fp8" if row.options["fp8"] else row.options["precision"] or "bf16"
    batch, decoder = row.number("global_batch", 32), card(shape, row.number("seq", 1024), _style(row, layout))
    model = MemoryModel(Workload(decoder, cluster, batch, precision, framework))
    last = model.stages(layout, _firsts(row, shape, layout), max(1, layout.micro_batches(batch)))[-1]
    if row.says("defer"):
        tokens = row.number("seq", 1024) * layout.micro_batch
        deferred = DEFERRED * tokens * shape.vocab // layout.tp * 2
        return replace(last, activations=last.activations + deferred)
    return last


def _layout(row: MegatronRow) -> Layout:
    tp, pp, cp = (row.number(name, 1) for name in ("tp", "pp", "cp"))
    devices = row.number("nodes", 1) * row.number("gpus_per_node", 8)
    if row.says("release"):
        devices = max(devices, tp * pp * cp * row.number("ep", 1), 64)
    layers, per_stage = row.number("layers", 12), row.number("layers_per_vstage", 0)
    vpp = layers // pp // per_stage if per_stage else row.number("vpp_stages", 1)
    if cut := _explicit_cut(row, pp):
        vpp = len(cut) // pp
    return Layout(
        dp=max(1, devices // (tp * pp * cp)),
        tp=tp,
        pp=pp,
        cp=cp,
        ep=row.number("ep", 1),
        vpp=vpp,
        schedule="interleaved" if vpp > 1 else "1f1b",
        sequence_parallel=row.options["sp"] == "true" and tp > 1,
        micro_batch=row.number("micro_batch", 4),
        recompute=row.options["recompute"] or "none",
    )


def _explicit_cut(row: MegatronRow, pp: int) -> tuple[int, ...] | None:
    """First block of each virtual stage, where the configuration lays the pipeline out by hand."""
    return next((cut for (word, ranks), cut in PIPELINES.items() if row.says(word) and ranks == pp), None)


def _local(row: MegatronRow) -> bool:
    """Whether the run used Megatron's own modules instead of Transformer Engine's."""
    return row.says("gpt3_mcore_tp", "local_spec") and not row.says("cp2")


def _unfused(row: MegatronRow) -> bool:
    """Whether attention writes its scores: deterministic runs do, unless they resume or have context parallelism."""
    if row.options["deterministic_env"] != "1":
        return row.case.startswith("bert") or row.says("loss_fusion")
    fused = row.says("resume", "memory_speed") or row.number("cp", 1) > 1
    return _local(row) or row.case.startswith("bert") or not fused


def _style(row: MegatronRow, layout: Layout) -> str:
    words = ["megatron", "mask"]
    if (layout.cp == 1 and not row.says("release", *LATENT_MIXTURES)) or row.case.startswith("bert"):
        words.append("dropout")
    if row.says("loss_fusion", "sm_gb200", *LATENT_MIXTURES):
        words.append("fused_loss")
    if _unfused(row):
        words.append("unfused")
    elif row.options["gpu"] != "h100" and row.options["deterministic_env"] == "1":
        words.append("two_outputs")
    if row.number("etp", layout.tp) == 1:
        words.append("whole_experts")
    if row.says("no_create_attention_mask"):
        words.remove("mask")
    return "+".join(words)


def _framework(row: MegatronRow, layout: Layout) -> Framework:
    return replace(
        FRAMEWORKS["megatron-lm"],
        optimizer_shard="dp" if row.options["dist_opt"] == "true" and not row.says("multi_dist") else "none",
        gradient_bytes=0 if row.options["precision"] == "fp16" else 4,
        dummy_gradients=row.says("release", "defer", *LATENT_MIXTURES),  # else products do not add gradients
        vocab_multiple=row.number("vocab_div", 128),
        splits_experts=row.number("etp", layout.tp) > 1,
        workspace_bytes=_workspace(row),
    )


def _workspace(row: MegatronRow) -> int:
    """Bytes of the matrix libraries: two of torch's handles, each 8 blocks of 4 MiB for deterministic runs and on new
    devices, and Transformer Engine's; Megatron's own modules have two handles more."""
    new = row.options["gpu"] in ("h100", "gb200")
    each = 32 * MIB if new or row.options["deterministic_env"] == "1" else 8320 * 1024
    engine = (32 if new else 4) * MIB
    grouped = row.says("grouped", "top2router", "average_in", "a2a_ovlp", "muon", "etp2_pp2_resume", "mixtral")
    streams = 5 if grouped or row.says(*LATENT_MIXTURES) else 1  # products of many experts have four of their own
    return 4 * each if _local(row) else 2 * each + streams * engine


def _shape(row: MegatronRow, layout: Layout) -> DecoderShape:
    hidden, heads = row.number("hidden", 512), row.number("heads", 8)
    gated = row.options["swiglu"] == "true" or row.says("swiglu")
    experts = row.number("experts", 0)
    vocabulary = next((size for name, size in VOCABULARY.items() if row.says(name)), GPT2_VOCABULARY)
    latent = next((sizes for name, sizes in LATENT_MIXTURES.items() if row.says(name)), None)
    ffn = row.number("ffn", int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden)
    rope = row.says("rope", "15b", "mixtral", *LATENT_MIXTURES)
    shape = DecoderShape(
        layers=row.number("layers", 12),
        hidden=hidden,
        heads=heads,
        kv_heads=row.number("kv_groups", heads),
        head_dim=hidden // heads,
        ffn=ffn,
        vocab=vocabulary,
        gated=gated,
        tied=not row.says("untie", "15b", "gpt3_7b", "mla", "uneven", "account_for", "mixtral", *LATENT_MIXTURES),
        biases=not (experts or row.says("disable_bias", "15b", "mixtral")),
        norm="rms" if row.says("mixtral", *LATENT_MIXTURES) else "layer",
        learned_positions=0 if rope else row.number("seq", 1024),
        experts=experts,
        top_k=row.number("topk", 0),
    )
    if latent is not None:
        width, dense = latent
        shape = replace(shape, expert_ffn=width, shared_ffn=width, first_dense_layers=dense, mtp_layers=1)
        return replace(shape, head_dim=128, q_lora=1536, kv_lora=512, rope_head_dim=64, v_head_dim=128)
    if row.says("mla"):
        return replace(shape, q_lora=192, kv_lora=64, head_dim=16, rope_head_dim=8, v_head_dim=16)
    return shape


def _firsts(row: MegatronRow, shape: DecoderShape, layout: Layout) -> list[int]:
    """First block of each virtual stage. Without an explicit cut, stages have equal numbers of layers; the embedding is
    on the first and the head on the last."""
    each = shape.layers // (layout.pp * layout.vpp)
    equal = (0, *(1 + each * stage for stage in range(1, layout.pp * layout.vpp)))
    return list(_explicit_cut(row, layout.pp) or equal)


def predictions(data: Path) -> Iterator[tuple[MegatronRow, StageMemory | Unsupported]]:
    """Each measured row of the table in folder `data`, with its prediction."""
    for row in read_megatron_rows(data / "megatron_memory.csv"):
        yield row, predicted(row)


def errors(data: Path) -> dict[str, list[float]]:
    """Signed relative errors of the predicted rows: of the peak, and of the bytes allocated between steps."""
    signed: dict[str, list[float]] = {"peak_allocated": [], "between_steps": []}
    for row, answer in predictions(data):
        if isinstance(answer, StageMemory):
            signed["peak_allocated"].append(answer.allocated / row.max_allocated_bytes - 1)
            if row.allocated_bytes:
                signed["between_steps"].append(_between_steps(row, answer) / row.allocated_bytes - 1)
    return signed


def _between_steps(row: MegatronRow, memory: StageMemory) -> int:
    """Bytes between steps: the model's state, and the libraries' workspaces."""
    halves = row.options["precision"] == "fp16"  # the update of fp16 weights leaves fp32 gradients
    return memory.weights + memory.gradients + memory.optimizer * (16 if halves else 12) // 12 + _workspace(row)


def main() -> None:
    """Prints the error of each row and of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of megatron_memory.csv")
    data, skipped = parser.parse_args().data, 0
    for row, answer in predictions(data):
        if isinstance(answer, Unsupported):
            skipped += 1
            continue
        error = answer.allocated / row.max_allocated_bytes - 1
        still = _between_steps(row, answer) / row.allocated_bytes - 1 if row.allocated_bytes else 0.0
        print(f"{error:+8.1%} {still:+8.1%}  {row.case} {row.golden}")
    for name, signed in errors(data).items():
        sizes = sorted(map(abs, signed))
        middle, mean = sizes[len(sizes) // 2], sum(sizes) / len(sizes)
        print(f"{name}: {len(sizes)} rows, mean {mean:.1%}, median {middle:.1%}, largest {sizes[-1]:.1%}")
    print(f"{skipped} rows of models without a card")


if __name__ == "__main__":
    main()
