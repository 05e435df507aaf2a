"""`plan --write`: a plan as a folder of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.verbs.start import cluster_of_job, groups_of_job, locate_problems, read_job

if TYPE_CHECKING:
    from meshwright.job import Job
    from meshwright.plan import Plan
    from meshwright.report.training_words import Recipe

#: Fields that `[train]` and a Recipe share.
TRAINING = (
    *("steps", "lr", "warmup_steps", "decay", "min_lr_ratio", "decay_fraction", "weight_decay", "betas", "eps", "clip"),
    "seed",
)


def write_plan(plan: Plan, job: Job | str | Path, overrides: Sequence[str], folder: str | Path) -> list[Path]:
    """Write a plan of the job into a folder and return the paths: plan.json, plan.html, its timeline as SVG and as a
    Chrome trace, and its configuration for torchtitan, Megatron-LM and DeepSpeed.

    Raises InputError, before anything is written, where an existing file was not written by a plan.
    """
    from meshwright.report.planfolder import write_plan as write

    valid_job = read_job(job, overrides, data_must_exist=False)
    return write(plan, recipe_of_job(valid_job), folder)


def recipe_of_job(job: Job) -> Recipe:
    """What a configuration for another framework needs beside the plan."""
    from meshwright.report.training_words import Recipe

    model: dict[str, Any] = {"shape": None}
    if job.model.module is None:
        from meshwright import families

        with locate_problems(job):
            config = families.config_of_job(job)
        model = {name: getattr(config, name) for name in ("shape", "rope_theta", "rope_scaling", "norm_eps")}
    cluster = groups_of_job(job).groups[0] if job.cluster.groups else cluster_of_job(job)
    return Recipe(
        seq_len=job.data.seq_len or 1,
        devices_per_node=cluster.devices_per_node,
        **model,
        **{name: getattr(job.train, name) for name in TRAINING},
    )
