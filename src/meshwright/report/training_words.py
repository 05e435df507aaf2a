"""Optimizer, learning rate, clipping and seed of a job as options of torchtitan, Megatron-LM and DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.families.decoder import DecoderShape
from meshwright.layout import Layout

NO_CLIPPING = 1e30


@dataclass(frozen=True)
class Recipe:
    """What a configuration needs beside the plan. `shape` is None for a model that is not a decoder of a known kind;
    the rest is as in a job's `[train]`."""

    shape: DecoderShape | None
    seq_len: int
    steps: int
    lr: float
    devices_per_node: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm_eps: float = 1e-5
    warmup_steps: int = 0
    decay: str = "cosine"  # "cosine", "wsd" or "constant"
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    seed: int = 0

    def nodes(self, layout: Layout) -> tuple[int, int]:
        """(nodes, processes per node)."""
        each = min(self.devices_per_node, layout.devices)
        return -(-layout.devices // each), each


def titan_training(recipe: Recipe, omitted: list[str]) -> dict[str, dict[str, Any]]:
    """Tables of torchtitan's configuration, without the keys that the layout decides."""
    if recipe.weight_decay:
        omitted.append("weight decay of matrices alone: torchtitan decays every parameter")
    rate: dict[str, Any] = {"warmup_steps": recipe.warmup_steps}
    if recipe.decay == "constant":
        rate["decay_ratio"] = 0.0
    elif recipe.decay == "wsd":
        rate |= {"decay_ratio": recipe.decay_fraction, "decay_type": "linear", "min_lr_factor": recipe.min_lr_ratio}
    else:
        rate |= {"decay_type": "cosine", "min_lr_factor": recipe.min_lr_ratio}
    first, second = recipe.betas
    adam = {"beta1": first, "beta2": second, "eps": recipe.eps, "weight_decay": recipe.weight_decay}
    return {
        "optimizer": {"name": "AdamW", "lr": recipe.lr, **adam},
        "lr_scheduler": rate,
        "training": {"max_norm": recipe.clip or NO_CLIPPING},
        "debug": {"seed": recipe.seed},
    }


def megatron_training(recipe: Recipe, omitted: list[str]) -> list[str | int | float]:
    """Options of Megatron-LM."""
    floor = float(f"{recipe.lr * (1.0 if recipe.decay == 'constant' else recipe.min_lr_ratio):.6g}")
    style = {"wsd": "WSD"}.get(recipe.decay, recipe.decay)
    words: list[str | int | float] = [
        *("--train-iters", recipe.steps, "--lr", recipe.lr, "--min-lr", floor, "--lr-decay-style", style),
        *("--lr-warmup-iters", recipe.warmup_steps, "--lr-decay-iters", max(recipe.steps, recipe.warmup_steps + 1)),
        *("--adam-beta1", recipe.betas[0], "--adam-beta2", recipe.betas[1], "--adam-eps", recipe.eps),
        *("--weight-decay", recipe.weight_decay, "--clip-grad", recipe.clip),
    ]
    if recipe.decay == "wsd":
        last = max(1, round(recipe.steps * recipe.decay_fraction))
        words += ["--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", last]
    if recipe.seed:
        words += ["--seed", recipe.seed]
    else:
        omitted.append("seed 0: Megatron needs a seed above zero, and takes 1234")
    return words


def deepspeed_training(recipe: Recipe, omitted: list[str]) -> dict[str, Any]:
    """Keys of DeepSpeed's configuration."""
    adam = {"lr": recipe.lr, "betas": list(recipe.betas), "eps": recipe.eps, "weight_decay": recipe.weight_decay}
    warm = {"warmup_num_steps": max(1, recipe.warmup_steps), "warmup_type": "linear"}
    if recipe.decay == "cosine":
        cosine = {"total_num_steps": recipe.steps, "warmup_min_ratio": 0.0, "cos_min_ratio": recipe.min_lr_ratio}
        schedule = {"type": "WarmupCosineLR", "params": {**cosine, **warm}}
    else:
        schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": recipe.lr, **warm}}
    if recipe.decay == "wsd":
        omitted.append(f"the decay over the last {recipe.decay_fraction:.0%} of the steps: the rate stays constant")
    omitted.append(
        f"the seed ({recipe.seed}), and weight decay of matrices alone: the training script's parameter groups"
    )
    return {
        "gradient_clipping": recipe.clip,
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": schedule,
    }
