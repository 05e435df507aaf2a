"""`plan --write`: a plan as files, with what the job says of the run beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.verbs.start import cluster_of_job, groups_of_job, locate_problems, read_job

if TYPE_CHECKING:
    from meshwright.families.decoder_shape import DecoderShape
    from meshwright.families.llama.card import LlamaShape
    from meshwright.job import Job
    from meshwright.plan import Plan
    from meshwright.report.training_words import Recipe

#: Fields of `[train]` that a Recipe has too.
TRAINING = (
    *("steps", "lr", "warmup_steps", "decay", "min_lr_ratio", "decay_fraction", "weight_decay", "betas", "eps", "clip"),
    "seed",
)


def write_plan(plan: Plan, job: Job | str | Path, overrides: Sequence[str], folder: str | Path) -> list[Path]:
    """Write a plan of the job into a folder and return the paths: plan.json, plan.html, its timeline as SVG and as a
    Chrome trace, and its configuration for torchtitan, Megatron-LM and DeepSpeed.

    Raises InputError, before anything is written, where a file there is not an earlier plan's.
    """
    from meshwright.report.planfolder import write_plan as write

    sound = read_job(job, overrides, data_must_exist=False)
    return write(plan, recipe_of_job(sound), folder)


def recipe_of_job(job: Job) -> Recipe:
    """What a configuration for another framework says beside the plan."""
    from meshwright.report.training_words import Recipe

    shape: DecoderShape | None = None
    theta, eps, scaling = 10000.0, 1e-5, None
    if job.model.module is None:
        from meshwright import families

        with locate_problems(job):
            shape, theta, eps, scaling = _of_hf(job) or _of_llama(families.shape_of_job(job))
    cluster = groups_of_job(job).groups[0] if job.cluster.groups else cluster_of_job(job)
    return Recipe(
        shape=shape,
        seq_len=job.data.seq_len or 1,
        devices_per_node=cluster.devices_per_node,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=eps,
        **{name: getattr(job.train, name) for name in TRAINING},
    )


Facts = tuple["DecoderShape", float, float, Mapping[str, Any] | None]


def _of_hf(job: Job) -> Facts | None:
    """Shape, base of the rotary positions, epsilon and scaling of the positions of a Hugging Face folder's model, where
    it is no Llama."""
    if job.model.hf is None:
        return None
    from meshwright import families
    from meshwright.families import decoder_hf
    from meshwright.families.llama import card as llama

    path = Path(job.model.hf) / "config.json"
    config = families.read_config(path)
    if config.get("model_type") in llama.ARCHITECTURES:
        return None
    shape = decoder_hf.shape_from_hf_config(config, str(path))
    inner = {**config, **(config.get("text_config") or {})}
    eps = float(inner.get("rms_norm_eps") or inner.get("layer_norm_epsilon") or 1e-5)
    rope = dict(inner.get("rope_parameters") or inner.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or inner.get("rope_theta") or 10000.0)
    scaled = rope and rope.get("rope_type", rope.get("type")) != "default"
    return shape, theta, eps, rope if scaled else None


def _of_llama(shape: LlamaShape) -> Facts:
    from meshwright.families.decoder import DecoderShape

    decoder = DecoderShape(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn=shape.ffn,
        vocab=shape.vocab,
        tied=shape.tied,
        qk_norm=shape.qk_norm,
        sliding_window=shape.sliding_window,
        bias_of=("qkv", "out") if shape.output_bias else ("qkv",) if shape.attention_bias else (),
        hf_type=shape.hf_type,
    )
    return decoder, shape.rope_theta, shape.norm_eps, shape.rope_scaling
