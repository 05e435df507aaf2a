"""A plan as configuration of other frameworks, and what that configuration cannot express.

Option names are those of torchtitan 0.2.2 (torchtitan/config/job_config.py, the last release that reads TOML),
Megatron-LM core 0.19.0 (megatron/training/arguments.py and config/) and DeepSpeed 0.19.6 (docs/_pages/config-json.md).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshwright.files import toml_text
from meshwright.layout import Layout
from meshwright.plan import Choice, Plan
from meshwright.plan.pipeline import TABLE
from meshwright.plan.rules import FRAMEWORKS
from meshwright.report.training_words import Recipe, deepspeed_training, megatron_training, titan_training

#: Layout.schedule -> torchtitan's name for it (a class of torch.distributed.pipelining); it lacks the others.
TITAN_SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "zb-h1": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
MEGATRON_SCHEDULES = ("1f1b", "interleaved")
#: Models that torchtitan has code for, by Hugging Face's model type.
TITAN_MODELS = {"llama": "llama3", "mistral": "llama3", "deepseek_v3": "deepseek_v3", "qwen3": "qwen3"}
TITAN_MODELS |= {"qwen3_moe": "qwen3"}
#: Hugging Face's model types that Megatron's options below describe fully ("" is a family of ours). For other types the
#: options give the sizes alone.
FULLY_DESCRIBED = ("", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt2")
ALIBI = ("bloom", "mpt")


@dataclass(frozen=True)
class Export:
    """The configuration of a framework: its files by name, and a sentence on each thing that they leave out."""

    version: str
    files: Mapping[str, str]
    omitted: tuple[str, ...] = field(default=())


def torchtitan(plan: Plan, recipe: Recipe) -> Export:
    """torchtitan.toml. Its local batch is cut into micro-batches in a pipeline; elsewhere micro-batches accumulate."""
    choice, layout = plan.chosen, plan.chosen.layout
    omitted: list[str] = []
    sharding, whole_only = _titan_sharding(layout, omitted), layout.pp > 1 and TABLE[layout.schedule].splits
    if layout.tp > 1 and not layout.sequence_parallel:
        omitted.append("tensor parallelism without sequence parallelism: sequence parallelism comes with it")
    if layout.recompute == "selective":
        omitted.append(
            "selective recompute: theirs keeps every second matrix product, it does not drop attention alone"
        )
    if layout.offload:
        omitted.append("offload of the optimizer alone: theirs takes parameters and gradients along")
    training = titan_training(recipe, omitted)
    tables: dict[str, dict[str, Any]] = {
        "job": {"description": f"{plan.model} as {layout}"},
        "model": _titan_model(recipe, omitted),
        "optimizer": training["optimizer"],
        "lr_scheduler": training["lr_scheduler"],
        "training": {
            **training["training"],
            "local_batch_size": layout.micro_batch * (choice.micro_batches if layout.pp > 1 else 1),
            "global_batch_size": plan.global_batch,
            "seq_len": recipe.seq_len,
            "steps": recipe.steps,
            "enable_cpu_offload": layout.offload,
            "mixed_precision_param": "float32" if choice.precision == "fp32" else "bfloat16",
        },
        "parallelism": {
            **sharding,
            "tensor_parallel_degree": layout.tp,
            "pipeline_parallel_degree": layout.pp,
            "context_parallel_degree": layout.cp,
            "expert_parallel_degree": layout.ep,
            **({"expert_tensor_parallel_degree": layout.tp} if layout.ep > 1 else {}),
            **(_titan_pipeline(choice, recipe, omitted) if layout.pp > 1 else {}),
        },
        "activation_checkpoint": {
            "mode": layout.recompute,
            **({"selective_ac_option": "op"} if layout.recompute == "selective" else {}),
        },
        "compile": {"enable": choice.compiled and not whole_only},
        "debug": training["debug"],
    }
    if choice.compiled and whole_only:
        omitted.append(f"compilation: torch refuses it with {layout.schedule}, which splits backwards")
    if choice.precision not in ("fp32", "bf16"):
        omitted.append(f"{choice.precision}: bf16 is written; fp8 is a converter of the model there")
    nodes, each = recipe.nodes(layout)
    launch = f"torchrun --nnodes {nodes} --nproc_per_node {each} -m torchtitan.train --job.config_file torchtitan.toml"
    text = _comments(plan, "torchtitan 0.2.2", omitted, f"start: {launch}") + "\n" + toml_text(tables)
    return Export("0.2.2", {"torchtitan.toml": text}, tuple(omitted))


def _titan_sharding(layout: Layout, omitted: list[str]) -> dict[str, Any]:
    """torchtitan's degrees of data parallelism. It shards weights over its shard degree times its context degree."""
    weights, more = layout.shard // layout.cp if layout.shard % layout.cp == 0 else 0, {}
    if weights == 0:
        omitted.append(
            f"shard={layout.shard} with cp={layout.cp}: weights are sharded over context-parallel ranks in any case; "
            f"this says shard={layout.cp}"
        )
        weights = 1
    if weights == layout.cp == 1 < layout.dp < layout.devices:
        omitted.append(
            "whole weights beside other kinds of parallelism: they are sharded over the data-parallel ranks, and stay "
            "gathered after the forward"
        )
        weights, more = layout.dp, {"fsdp_reshard_after_forward": "never"}
    if weights * layout.cp % layout.ep:
        omitted.append(
            f"shard={layout.shard} with ep={layout.ep}: experts are spread over ranks that shard the weights; "
            f"this says shard={layout.dp * layout.cp}"
        )
        weights = layout.dp
    degrees = {"data_parallel_replicate_degree": layout.dp // weights, "data_parallel_shard_degree": weights}
    return {**degrees, **more}


def _titan_model(recipe: Recipe, omitted: list[str]) -> dict[str, Any]:
    shape = recipe.shape
    name = None
    if shape is not None:
        name = TITAN_MODELS.get(shape.hf_type or ("deepseek_v3" if shape.experts else "llama"))
    if shape is None or name is None:
        what = f"no {shape.hf_type}" if shape else "no decoder of this kind"
        omitted.append(f"the model: torchtitan has {what}; it needs a TrainSpec of its own, named 'planned' here")
        return {"name": "planned", "flavor": "planned"}
    sizes = (
        f"dim={shape.hidden}, n_layers={shape.layers}, n_heads={shape.heads} of width {shape.head_dim}, "
        f"n_kv_heads={shape.kv_heads}, rope_theta={recipe.rope_theta:g}"
    )
    if recipe.rope_scaling:
        sizes += f", rotary positions scaled by {json.dumps(dict(recipe.rope_scaling), sort_keys=True)}"
    experts = ""
    if shape.experts:
        width = shape.expert_ffn or shape.ffn
        experts = f", and {shape.experts} experts of width {width}, {shape.top_k} to a token"
    omitted.append(
        f"the model's shape, which is code there: add the flavor 'planned' to torchtitan/models/{name} with {sizes}, "
        f"vocab_size={shape.vocab} and a feed-forward width of {shape.ffn}{experts}"
    )
    return {"name": name, "flavor": "planned"}


def _titan_pipeline(choice: Choice, recipe: Recipe, omitted: list[str]) -> dict[str, Any]:
    layout = choice.layout
    word = TITAN_SCHEDULES.get(layout.schedule)
    if word is None:
        word = "1F1B"
        omitted.append(
            f"the schedule {layout.schedule}: 1F1B is written; pipeline_parallel_schedule_csv takes any order"
        )
    tables = {"pipeline_parallel_schedule": word, "pipeline_parallel_microbatch_size": layout.micro_batch}
    if recipe.shape is None:
        omitted.append("where the stages are cut: module names are the model's own")
        return tables
    names = {"embed": ["tok_embeddings"], "head": ["norm", "output"]}
    parts = [[name for block in stage for name in names.get(block, [f"layers.{block}"])] for stage in choice.stages]
    return {**tables, "module_fqns_per_model_part": parts}


def megatron(plan: Plan, recipe: Recipe) -> Export:
    """megatron.sh, which calls pretrain_gpt.py with mock data, to be replaced by the user's data and tokenizer."""
    choice, layout = plan.chosen, plan.chosen.layout
    omitted: list[str] = []
    words: list[str | int | float] = [
        *_megatron_model(recipe, omitted),
        *("--seq-length", recipe.seq_len, "--max-position-embeddings", recipe.seq_len),
        *("--micro-batch-size", layout.micro_batch, "--global-batch-size", plan.global_batch),
        *megatron_training(recipe, omitted),
        *("--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp),
        *("--context-parallel-size", layout.cp, "--expert-model-parallel-size", layout.ep),
    ]
    words += ["--sequence-parallel"] if layout.sequence_parallel else []
    if layout.pp > 1:
        words += _megatron_pipeline(choice, recipe, omitted)
    words += _megatron_sharding(plan, omitted)
    if layout.recompute == "selective":
        words += ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
    elif layout.recompute == "full":
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
    if layout.offload:
        words += ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
        words += [] if "--use-distributed-optimizer" in words else ["--use-distributed-optimizer"]
    precisions = {"bf16": ["--bf16"], "fp16": ["--fp16"], "fp8": ["--bf16", "--fp8-format", "hybrid"], "fp32": []}
    if choice.precision not in precisions:
        omitted.append(f"{choice.precision}: bf16 is written")
    words += precisions.get(choice.precision, ["--bf16"])
    if choice.compiled:
        omitted.append("compilation by torch.compile: its kernels are fused by hand")
    words += ["--mock-data", "--tokenizer-type", "NullTokenizer"]
    words += ["--vocab-size", recipe.shape.vocab, "--make-vocab-size-divisible-by", 1] if recipe.shape else []
    nodes, each = recipe.nodes(layout)
    lines = [_comments(plan, "Megatron-LM, core 0.19.0", omitted, "mock data: put --data-path and your tokenizer here")]
    # Megatron's FSDP refuses the single connection that its tensor and context parallelism need before Blackwell.
    lines += ["set -eu", *([] if "--use-megatron-fsdp" in words else ["export CUDA_DEVICE_MAX_CONNECTIONS=1"])]
    lines += [f"torchrun --nnodes {nodes} --nproc_per_node {each} \\"]
    lines += ['  --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-localhost}" --master_port 29500 \\']
    lines += ["  pretrain_gpt.py \\", *_options(words)]
    return Export("core 0.19.0", {"megatron.sh": "#!/bin/sh\n" + "\n".join(lines) + "\n"}, tuple(omitted))


def _megatron_model(recipe: Recipe, omitted: list[str]) -> list[str | int | float]:
    shape = recipe.shape
    if shape is None:
        omitted.append("the model: pretrain_gpt.py builds GPT models only; its sizes are left out")
        return []
    words: list[str | int | float] = [
        *("--num-layers", shape.layers, "--hidden-size", shape.hidden, "--ffn-hidden-size", shape.ffn),
        *("--num-attention-heads", shape.heads, "--attention-dropout", 0, "--hidden-dropout", 0),
    ]
    if shape.latent:
        words += ["--multi-latent-attention", "--kv-lora-rank", shape.kv_lora, "--qk-head-dim", shape.head_dim]
        words += ["--qk-pos-emb-head-dim", shape.rope_head_dim, "--v-head-dim", shape.v_head_dim or shape.head_dim]
        words += ["--q-lora-rank", shape.q_lora] if shape.q_lora else []
    else:
        words += ["--kv-channels", shape.head_dim]
        words += (
            ["--group-query-attention", "--num-query-groups", shape.kv_heads] if shape.kv_heads < shape.heads else []
        )
    words += ["--swiglu"] if shape.gated else []
    if shape.hf_type not in FULLY_DESCRIBED:
        omitted.append(
            f"what a {shape.hf_type} is beside its sizes (activation, positions, the order within a layer, how tokens "
            "choose experts): compare the options with its config"
        )
    words += ["--window-size", f"{shape.sliding_window - 1},0"] if shape.sliding_window else []
    words += ["--normalization", "RMSNorm" if shape.norm == "rms" else "LayerNorm", "--norm-epsilon", recipe.norm_eps]
    words += ["--disable-bias-linear"] if not shape.biases else []
    words += ["--add-qkv-bias"] if "qkv" in shape.bias_of else []
    words += ["--qk-layernorm"] if shape.qk_norm else []
    words += ["--untie-embeddings-and-output-weights"] if not shape.tied else []
    positions = "learned_absolute" if shape.learned_positions else "none" if shape.hf_type in ALIBI else "rope"
    words += ["--position-embedding-type", positions, "--rotary-base", round(recipe.rope_theta)]
    scaling = dict(recipe.rope_scaling or {})
    if scaling.get("rope_type") == "llama3":
        words += ["--use-rope-scaling", "--rope-scaling-factor", scaling.get("factor", 8.0)]
    elif scaling:
        omitted.append(f"rotary positions scaled by {json.dumps(scaling, sort_keys=True)}: they are left unscaled")
    if shape.experts:
        words += ["--num-experts", shape.experts, "--moe-router-topk", shape.top_k, "--moe-grouped-gemm"]
        words += ["--moe-ffn-hidden-size", shape.expert_ffn or shape.ffn, "--moe-token-dispatcher-type", "alltoall"]
        words += ["--moe-shared-expert-intermediate-size", shape.shared_ffn] if shape.shared_ffn else []
        mixed = [int(shape.mixed(layer)) for layer in range(shape.layers)]
        words += [] if all(mixed) else ["--moe-layer-freq", str(mixed).replace(" ", "")]
    if shape.mtp_layers:
        words += ["--mtp-num-layers", shape.mtp_layers]
    return words


def _megatron_pipeline(choice: Choice, recipe: Recipe, omitted: list[str]) -> list[str | int | float]:
    layout = choice.layout
    if layout.schedule not in MEGATRON_SCHEDULES:
        near = "interleaved 1F1B" if layout.vpp > 1 else "1F1B"
        omitted.append(f"the schedule {layout.schedule}: it runs {near}, with the stages in a loop")
    if recipe.shape is None:
        return ["--num-virtual-stages-per-pipeline-rank", layout.vpp] if layout.vpp > 1 else []
    letters = {"embed": "E", "head": "L"}
    stages = ["".join(letters.get(b, "m" if b.startswith("mtp") else "t") for b in stage) for stage in choice.stages]
    return ["--pipeline-model-parallel-layout", "|".join(stages)]


def _megatron_sharding(plan: Plan, omitted: list[str]) -> list[str | int | float]:
    layout = plan.chosen.layout
    data = layout.dp * layout.cp
    if data == 1:
        return []
    if layout.shard == data and layout.shard > 1 and layout.pp == 1:
        fsdp = ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"]
        more = ["--use-distributed-optimizer", "--no-gradient-accumulation-fusion", "--ckpt-format", "fsdp_dtensor"]
        return [*fsdp, *more]
    words: list[str | int | float] = ["--use-distributed-optimizer"]
    row = FRAMEWORKS[plan.framework]
    if row.gradient_overlap or row.gather_overlap:
        words += ["--overlap-grad-reduce", "--overlap-param-gather"]
    else:
        omitted.append(
            "overlap, since the prediction is without: --overlap-grad-reduce --overlap-param-gather make it faster"
        )
    if layout.shard == 1:
        if not row.offers.spreads_optimizer:
            omitted.append(
                "whole optimizer states on every rank are not asked for: they are spread, which costs no more"
            )
        return words
    omitted.append(
        "weights sharded over part of the data-parallel ranks or in a pipeline: the optimizer alone is sharded"
    )
    if layout.shard < data:
        words += ["--num-distributed-optimizer-instances", data // layout.shard]
    return words


def deepspeed(plan: Plan, recipe: Recipe) -> Export:
    """deepspeed.json, and deepspeed.sh with the launch command and the comments, which JSON has no place for."""
    choice, layout = plan.chosen, plan.chosen.layout
    omitted: list[str] = []
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": choice.micro_batches,
        **deepspeed_training(recipe, omitted),
        "zero_optimization": _zero(plan, omitted),
    }
    if choice.precision != "fp32":
        config["fp16" if choice.precision == "fp16" else "bf16"] = {"enabled": True}
    if choice.precision not in ("fp32", "bf16", "fp16"):
        omitted.append(f"{choice.precision}: bf16 is written")
    if layout.tp > 1:
        config["tensor_parallel"] = {"autotp_size": layout.tp}
        del config["train_batch_size"]  # counted over all ranks there, tensor-parallel ones too
        omitted.append(f"train_batch_size={plan.global_batch}: AutoTP counts it {layout.tp} times over: it is left out")
        if layout.pp > 1:
            omitted.append("tensor parallelism in a pipeline: AutoTP has none, the layers must split themselves")
        if layout.sequence_parallel:
            omitted.append("sequence parallelism beside tensor parallelism: AutoTP has none")
    if layout.cp > 1:
        config |= {"sequence_parallel_size": layout.cp, "data_parallel_size": layout.dp}
        omitted.append(
            f"context parallelism by passing keys on: Ulysses over {layout.cp} ranks is written, which splits heads"
        )
    if layout.pp > 1:
        omitted.append(
            f"the pipeline, which is code there: PipelineModule(layers, num_stages={layout.pp}); its schedule is 1F1B"
            + ("" if layout.schedule == "1f1b" else f", not {layout.schedule}")
        )
        config["pipeline"] = {"partition": "best"}
        if len({len(stage) for stage in choice.stages}) > 1:
            sizes = ", ".join(str(len(stage)) for stage in choice.stages)
            omitted.append(f"stages of {sizes} blocks: partition 'best' weighs parameters, and cuts by itself")
    if layout.ep > 1:
        config["expert_parallel"] = {"enabled": True, "autoep_size": layout.ep}
        omitted.append(
            "expert parallelism for a model that is no Hugging Face mixture (AutoEP finds those), or with tp > 1"
        )
    if layout.recompute != "none":
        config["activation_checkpointing"] = {"partition_activations": False, "cpu_checkpointing": False}
        omitted.append(f"recompute={layout.recompute}: what is computed again is said in the model's code")
    if choice.compiled:
        omitted.append("compilation: engine.compile() in the training script")
    omitted.append("the model's shape and the sequence length: they are the training script's")
    nodes, each = recipe.nodes(layout)
    where = f"--num_nodes {nodes} --num_gpus {each}" + (" --hostfile hostfile" if nodes > 1 else "")
    launch = f"deepspeed {where} train.py --deepspeed --deepspeed_config deepspeed.json"
    shell = "#!/bin/sh\n" + _comments(plan, "DeepSpeed 0.19.6", omitted, "train.py is your own script") + launch + "\n"
    files = {"deepspeed.json": json.dumps(config, indent=2) + "\n", "deepspeed.sh": shell}
    return Export("0.19.6", files, tuple(omitted))


def _zero(plan: Plan, omitted: list[str]) -> dict[str, Any]:
    """The stage of ZeRO (Rajbhandari et al. 2020) that shards what the layout does."""
    layout = plan.chosen.layout
    data = layout.dp * layout.cp
    spread = layout.shard == 1 and data > 1 and FRAMEWORKS[plan.framework].offers.spreads_optimizer
    stage = 1 if spread else 0 if layout.shard == 1 else 1 if layout.pp > 1 else 3
    table: dict[str, Any] = {"stage": stage}
    if stage:
        table["overlap_comm"] = stage == 3
    if stage == 1 and not spread:
        omitted.append("weights and gradients sharded in a pipeline: ZeRO 1 shards the optimizer alone")
    if stage and layout.shard < data and not spread:
        if stage == 3:
            table["mics_shard_size"] = layout.shard
            omitted.append(
                "the model must be built under deepspeed.zero.MiCS_Init to be sharded over part of the ranks"
            )
        else:
            omitted.append(f"shard={layout.shard} of {data} data-parallel ranks: ZeRO 1 shards over all of them")
    if layout.offload:
        table["stage"] = max(1, stage)
        table["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return table


def _comments(plan: Plan, version: str, omitted: Sequence[str], note: str) -> str:
    """Comment lines: the framework and its version, the prediction, and what the files leave out."""
    seconds = plan.chosen.predicted.step_seconds
    lines = [
        f"For {version}; written by meshwright plan.",
        f"{plan.model} on {plan.cluster}, laid out as {plan.chosen.layout}",
        f"predicted: {seconds.mid:.4g} s a step ({seconds.low:.4g} to {seconds.high:.4g})",
        note,
        *(f"not said here: {sentence}" for sentence in omitted),
    ]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _options(words: Sequence[str | int | float]) -> list[str]:
    """Lines of a shell command, one per option with its value, quoted where the shell needs it."""
    lines: list[str] = []
    for word in words:
        text = shlex.quote(str(word))
        if str(word).startswith("--"):
            lines.append(f"  {text}")
        else:
            lines[-1] += f" {text}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


#: By the name of the framework (plan/rules/frameworks.py).
EXPORTERS: dict[str, Callable[[Plan, Recipe], Export]] = {
    "torchtitan": torchtitan,
    "megatron-lm": megatron,
    "deepspeed": deepspeed,
}
