"""Resolves a case to the estimator's inputs: the model's card, the cluster, the layout and the framework."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from meshwright.card import Card
from meshwright.cluster import Cluster, Device, Link, device_names, named_cluster
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.families import own_card
from meshwright.families.decoder import DecoderShape, card, parameters
from meshwright.layout import SCHEDULES, Layout
from meshwright.plan.cases.read import Case, nearest_word
from meshwright.plan.constants import DATASHEET
from meshwright.plan.cost import MemoryModel, usable_bytes
from meshwright.plan.pipeline.actions import schedule_problem
from meshwright.plan.rules import FRAMEWORKS, Framework
from meshwright.plan.workload import Workload

GB = 1e9
#: Word for a precision -> the device's rate that products run at.
PRECISIONS: Mapping[str, str] = {
    **dict.fromkeys(("fp32", "float32", "single", "tf32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "amp_bf16", "bf16_mixed", "mixed"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "amp_fp16", "fp16_mixed"), "fp16"),
    **dict.fromkeys(("fp8", "amp_fp8", "fp8_cs", "fp8_ds", "fp8_mx", "mxfp8", "fp8_tensorwise", "fp8_rowwise"), "fp8"),
    **dict.fromkeys(("fp8_sc", "fp8_hybrid", "float8"), "fp8"),
    **dict.fromkeys(("fp4", "nvfp4", "mxfp4"), "fp4"),
}
#: Word for what is recomputed in the backward pass -> the layout's word; SELECTIVE says what "selective" drops.
RECOMPUTES: Mapping[str, str] = {
    **dict.fromkeys(("none", "no", "off", "false"), "none"),
    **dict.fromkeys(("selective", "selective_attention", "selective_op", "selective_layer"), "selective"),
    **dict.fromkeys(("full", "all", "on", "true", "uniform", "block"), "full"),
    "unknown": "unknown",
}
SELECTIVE = {"selective_attention": "attention", "selective_op": "operations", "selective_layer": "block"}
#: Keys of a model's table that are fields of DecoderShape.
EXTRAS = (
    *("experts", "top_k", "expert_ffn", "shared_ffn", "first_dense_layers", "moe_every", "imbalance"),
    *("q_lora", "kv_lora", "rope_head_dim", "v_head_dim", "mtp_layers", "sliding_window"),
)
#: Largest ratio of all-reduce's bus bandwidth to its link's: sums in the switch halve the traffic at most.
MOST_BUS = 2.0
#: A stated count of parameters that is off by more than this share is reported.
MISCOUNTED = 0.1
#: The interval of a case with a guessed word is raised to this power.
GUESS_WIDTH = 1.4


@dataclass(frozen=True)
class ResolvedCase:
    """A case for the estimator. `assumed` says what was assumed; `guessed` counts the guessed words; `recomputed` is
    the share of the layers with full recompute, where the layout has none."""

    workload: Workload
    layout: Layout
    assumed: tuple[str, ...] = ()
    guessed: int = 0
    recomputed: float = 0.0

    @property
    def width(self) -> float:
        """The power of the interval's factors."""
        return GUESS_WIDTH if self.guessed else 1.0


def resolve(case: Case) -> ResolvedCase:
    """A case for the estimator. Raises InputError for an unknown device without figures, for a precision that the
    device does not have, and for contradictory figures."""
    assumed = list(case.assumed)
    cluster = case_cluster(case.cluster)
    assumed += cluster.assumed
    framework = _framework(case.software, assumed)
    precision, guesses = _precision(case.train.get("precision", "bf16"), cluster, assumed)
    shape = _for_ranks(_counted(case.model, framework, assumed), case.layout["tp"], assumed)
    layout, framework = _layout(case, framework, assumed)
    word, exact = nearest_word(case.layout["recompute"], RECOMPUTES, "unknown")
    drops = SELECTIVE.get(case.layout["recompute"].strip().lower().replace("-", "_"))
    style = card_style(framework.name, precision, drops)
    if style == "megatron-legacy" and framework.attention != "unfused":
        assumed.append("fp16 in Megatron-LM: the unfused attention of its releases of 2022")
        framework = replace(framework, attention="unfused")
    if framework.fused_cross_entropy:
        style += "+fused_loss"
    model = _card(shape, case.model["seq_len"], style)
    if drops is not None:
        framework = replace(framework, selective=drops)
    workload, share = Workload(model, cluster, case.train["global_batch"], precision, framework), None
    if word == "unknown":
        share, word = _least_recomputed(workload, layout), "none"
        meaning = "taken for none, since the case does not fit even with full recompute"
        if share is not None:
            meaning = f"of {share:.0%} of the layers, the least that fits"
        assumed.append(f"recompute '{case.layout['recompute']}': {meaning}")
        guesses += 1
    elif not exact:
        assumed.append(f"recompute '{case.layout['recompute']}': taken for {word}")
        guesses += 1
    return ResolvedCase(workload, replace(layout, recompute=word), tuple(assumed), guesses, share or 0.0)


def card_style(framework: str, precision: str, drops: str | None) -> str:
    """The style of the framework's blocks in a run at `precision` whose selective recompute drops `drops`."""
    row = FRAMEWORKS[framework]
    return row.legacy_style if row.legacy_style and (precision == "fp16" or drops == "attention") else row.style


def _framework(software: Mapping[str, Any], assumed: list[str]) -> Framework:
    name = str(software.get("framework", "unknown")).strip().lower()
    if name not in FRAMEWORKS:
        assumed.append(f"framework '{name}' is unknown")
        name = "unknown"
    row = FRAMEWORKS[name].with_software(software)
    assumed += row.assumed
    return row


def _precision(word: str, cluster: Cluster, assumed: list[str]) -> tuple[str, int]:
    precision, exact = nearest_word(word, PRECISIONS, "bf16")
    if not exact:
        assumed.append(f"precision '{word}': taken for {precision}")
    rates = cluster.device.flops
    if not rates.get(precision, 0.0) > 0:
        near = next((p for p in ("bf16", "fp16", "fp32") if rates.get(p, 0.0) > 0), "fp32")
        what = f"{cluster.device.name} has no known speed at {precision}"
        raise InputError(Problem("train.precision", what, f"nearest: {near}"))
    return precision, 0 if exact else 1


def _layout(case: Case, framework: Framework, assumed: list[str]) -> tuple[Layout, Framework]:
    degrees = case.layout
    fields = {key: degrees[key] for key in ("dp", "shard", "tp", "pp", "vpp", "cp", "ep", "sequence_parallel")}
    if framework.offers.sequence_always and degrees["tp"] > 1 and not degrees["sequence_parallel"]:
        fields["sequence_parallel"] = True
        assumed.append(f"{framework.name} runs sequence parallelism with tensor parallelism")
    schedule = "interleaved" if degrees["vpp"] > 1 else "1f1b"
    word = degrees.get("schedule")
    if word is not None and word.lower() in SCHEDULES:
        schedule = word.lower()
    elif word is not None:
        assumed.append(f"schedule '{word}': taken for {schedule}")
    if framework.offers.shards_context and degrees["shard"] % degrees["cp"]:
        fields["shard"] = degrees["cp"] * math.gcd(degrees["shard"], degrees["dp"])  # the mesh for FSDP spans both
        assumed.append(f"{framework.name} shards weights over context-parallel ranks too")
    if shard := degrees.get("optimizer_shard"):
        framework = replace(framework, optimizer_shard="dp" if shard > 1 else "none")
        if 1 < shard < (ranks := degrees["dp"] * degrees["cp"]):
            assumed.append(f"optimizer_shard={shard}: taken for all {ranks} ranks")
    offload = bool(degrees.get("offload", False))
    layout = Layout(**fields, micro_batch=degrees["micro_batch"], schedule=schedule, offload=offload)
    if wrong := schedule_problem(schedule, layout.pp, layout.micro_batches(case.train["global_batch"]), layout.vpp):
        raise InputError(Problem("layout.schedule", wrong, "nearest: 1f1b with vpp=1"))
    return layout, framework


def _least_recomputed(workload: Workload, layout: Layout) -> float | None:
    """The share of the layers that must recompute for the case to fit a device. None where full recompute is not
    enough: the run then saved memory in ways that the case does not mention, so memory does not tell its recompute."""
    model, room = MemoryModel(workload), usable_bytes(workload.cluster.device)
    firsts = _even_cut(len(workload.card.blocks), layout.pp * layout.vpp)

    def needs(word: str) -> int:
        micro_batches = layout.micro_batches(workload.global_batch)
        return max(stage.total for stage in model.stages(replace(layout, recompute=word), firsts, micro_batches))

    without, full = needs("none"), needs("full")
    if without <= room:
        return 0.0
    return (without - room) / (without - full) if full <= room else None


def _even_cut(blocks: int, stages: int) -> tuple[int, ...]:
    """First block of each stage: equal numbers of layers, the embedding with the first and the head with the last; with
    fewer layers than stages, equal numbers of blocks."""
    layers = blocks - 2
    if stages > layers:
        return tuple(blocks * stage // stages for stage in range(stages))
    return (0, *(1 + layers * stage // stages for stage in range(1, stages)))


def _for_ranks(shape: DecoderShape, tp: int, assumed: list[str]) -> DecoderShape:
    """With more tensor-parallel ranks than key and value heads, each rank has a copy of one head."""
    if tp <= shape.kv_heads:
        return shape
    assumed.append(f"{shape.kv_heads} key and value heads: copied for {tp} tensor-parallel ranks")
    return replace(shape, kv_heads=tp)


def case_shape(model: Mapping[str, Any], framework: Framework) -> DecoderShape:
    """The decoder of a case's model table. A feed-forward of two matrices means GPT's layers (layer norms, biases,
    learned positions, tied embeddings), one of three Llama's; a stated count of parameters overrides that."""
    heads = model["heads"]
    gated = model.get("gated", True)
    base = DecoderShape(
        layers=model["layers"],
        hidden=model["hidden"],
        heads=heads,
        kv_heads=model.get("kv_heads", heads),
        head_dim=model.get("head_dim", model["hidden"] // heads),
        ffn=model["ffn"],
        vocab=model["vocab"],
        gated=gated,
        tied=model.get("tied", not gated),
        biases=not gated and framework.biases,
        norm="rms" if gated else "layer",
        learned_positions=0 if gated else model["seq_len"],
        **{name: model[name] for name in EXTRAS if name in model},
    )
    if "params_b" not in model:
        return base
    ties = (model["tied"],) if "tied" in model else (base.tied, not base.tied)
    places = (base.learned_positions, model["seq_len"] if gated else 0)
    choices = [replace(base, tied=tied, learned_positions=place) for tied, place in product(ties, places)]
    return min(choices, key=lambda shape: abs(_count(shape) - model["params_b"] * 1e9))


def _counted(model: Mapping[str, Any], framework: Framework, assumed: list[str]) -> DecoderShape:
    """`case_shape`; but if its parameters miss the stated count, with the other kind of feed-forward if that comes
    nearer. A remaining difference is reported in `assumed`."""
    shape = case_shape(model, framework)
    stated = model.get("params_b", 0.0)
    if not stated or _off(shape, stated) <= MISCOUNTED:
        return shape
    other = case_shape({**model, "gated": not shape.gated}, framework)
    if _off(other, stated) < _off(shape, stated):
        assumed.append(f"model.gated={str(shape.gated).lower()}: {stated:g} B parameters contradict it, and decide")
        shape = other
    if _off(shape, stated) > MISCOUNTED:
        nearest = _count(shape) / 1e9
        assumed.append(f"model.params_b={stated:g}: the sizes come to {nearest:.3g} at the nearest, and decide")
    return shape


def _off(shape: DecoderShape, billions: float) -> float:
    """The relative difference between the shape's and the stated count of parameters."""
    return abs(_count(shape) / 1e9 / billions - 1)


@lru_cache(maxsize=256)
def _count(shape: DecoderShape) -> int:
    return sum(parameter.elements for parameter in parameters(shape))


@lru_cache(maxsize=256)
def _card(shape: DecoderShape, seq_len: int, style: str) -> Card:
    ours = own_card(shape, seq_len) if style == FRAMEWORKS["meshwright"].style else None
    return card(shape, seq_len, style) if ours is None else ours


def case_cluster(table: Mapping[str, Any]) -> Cluster:
    """The cluster of a case: a known device with the case's figures in place of its own, or an unknown device with the
    case's figures alone. Raises InputError where those are too few."""
    name, devices, figures = table["device"], table["devices"], table.get("figures", {})
    if name in device_names():
        return _with_figures(named_cluster(name, devices, table.get("devices_per_node")), figures)
    if not figures:
        hint = f"{nearest_name(name, device_names())}; or give its figures: cluster.figures"
        raise InputError(Problem("cluster.device", f"unknown device '{name}'", hint))
    per_node = table.get("devices_per_node", min(8, devices))
    needs = ["memory_gb", "memory_gbps", "tflops"]
    needs += ["intra_gbps"] if devices > 1 else []
    needs += ["inter_gbps"] if devices > per_node else []
    if missing := [Problem(f"cluster.figures.{key}", "is missing", "give it") for key in needs if not figures.get(key)]:
        raise InputError(missing)
    template = named_cluster("a100-sxm-80gb", devices, per_node)
    bare = Device(name, template.device.kind, 1, {}, 1.0, template.device.launch_seconds)
    assumed = (f"'{name}' starts operations as fast as other GPUs do",)
    return _with_figures(replace(template, device=bare, assumed=assumed), figures)


def _with_figures(cluster: Cluster, figures: Mapping[str, Any]) -> Cluster:
    """The cluster with `figures` in place of its own. A replaced peak drops the measured value that belongs to it."""
    if not figures:
        return cluster
    device = cluster.device
    rates = {key: rate * 1e12 for key, rate in figures.get("tflops", {}).items()}
    rates = {key: rate for key, rate in rates.items() if rate != device.flops.get(key)}  # equal figures replace nothing
    flops = {**device.flops, **rates}
    if "fp32" not in flops and rates:
        flops["fp32"] = min(rates.values())
    real = {key: rate for key, rate in device.real_flops.items() if key not in rates}
    real |= {key: rate * 1e12 for key, rate in figures.get("measured_tflops", {}).items()}
    if above := [key for key, rate in real.items() if rate > flops.get(key, math.inf)]:
        what = f"{real[above[0]] / 1e12:g} of {above[0]} is more than the peak of {flops[above[0]] / 1e12:g}"
        raise InputError(Problem("cluster.figures.measured_tflops", what, "give what products reach, below the peak"))
    measured = figures.get("measured_memory_gbps", 0.0) * GB
    peak = figures.get("memory_gbps", device.memory_bytes_per_second / GB) * GB
    if measured > peak > 1.0:  # a bare device has none
        what = f"{measured / GB:g} is more than the peak of {peak / GB:g}"
        raise InputError(Problem("cluster.figures.measured_memory_gbps", what, "give what copying reaches, below it"))
    # the peak that a data sheet would state for that measurement
    stated = figures.get("memory_gbps", 0.0) * GB if not measured else measured / DATASHEET["cuda.memory.share"]
    device = replace(
        device,
        flops=flops,
        real_flops=real,
        memory_bytes=int(figures.get("memory_gb", device.memory_bytes / GB) * GB),
        memory_bytes_per_second=stated or device.memory_bytes_per_second,
        real_memory_bytes_per_second=measured if stated else device.real_memory_bytes_per_second,
        units=figures.get("units", device.units),
    )
    intra, inter = (_link(getattr(cluster, side), figures, side) for side in ("intra", "inter"))
    return replace(cluster, device=device, intra=intra, inter=inter, joined=figures.get("joined", cluster.joined))


def _link(link: Link, figures: Mapping[str, Any], side: str) -> Link:
    if f"{side}_gbps" in figures:
        link = Link(link.name, figures[f"{side}_gbps"] * GB, link.latency_seconds, "switch")
    measured = figures.get("all_reduce_gbps", 0.0) * GB if side == "intra" else 0.0
    if measured > MOST_BUS * link.bytes_per_second:
        what = f"{measured / GB:g} is more than {MOST_BUS:g} times the link's {link.bytes_per_second / GB:g}"
        raise InputError(Problem("cluster.figures.all_reduce_gbps", what, "give the bus bandwidth of nccl-tests"))
    return replace(link, measured_bus=measured) if measured else link
