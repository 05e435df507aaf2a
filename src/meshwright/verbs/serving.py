"""`plan --serving`, and the settings of `serve`: how to serve a model.

For named devices the plan is for any engine with a paged cache, for this machine it is for our engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import CannotWork, Problem
from meshwright.verbs.plan import profile_of
from meshwright.verbs.start import cluster_of_job, locate_problems, read_job

if TYPE_CHECKING:
    from meshwright.cluster import Cluster, Device
    from meshwright.families import ModelConfig
    from meshwright.job import Job
    from meshwright.job.sections import ServeSection
    from meshwright.plan.serving import ServingPins, ServingPlan, Target


def serving_plan(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    profile: str | Path | None = None,
    datasheet: bool = False,
) -> ServingPlan:
    """How to serve the job's model: on the devices that `cluster.named` names, or on this machine by our engine.

    The target is the job's [serve] section. Needs no data and no weights. Raises CannotWork, with the nearest plan that
    works, where the model does not fit or the target cannot be met.
    """
    from meshwright.plan.serving import SERVERS, ServingQuery, make_serving_plan

    valid_job = read_job(job, overrides, data_must_exist=False, further_check=serving_plan)
    cluster = cluster_of_job(valid_job)
    with locate_problems(valid_job):
        model = _model_of_job(valid_job)
        named = valid_job.cluster.named is not None
        query = ServingQuery(
            model.shape,
            (lambda _: cluster) if named else _this_machine(),
            cluster.devices,
            SERVERS["paged" if named else "meshwright"],
            profile_of(profile, datasheet=datasheet),
            _target(valid_job.serve, model.longest),
            _pins(valid_job.serve),
            _served_precision(model.precision, cluster.device, ours=not named),
            model.longest,
        )
        return make_serving_plan(query)


@dataclass(frozen=True)
class PlannedSettings:
    """Complete settings of `serve`, the plan that they come from, and a one-line summary of it."""

    settings: ServeSection
    precision: str
    plan: ServingPlan
    summary: str


def plan_settings(folder: Path, settings: ServeSection) -> PlannedSettings:
    """Completes settings by a plan for the model in `folder` and the free memory of this machine.

    Where the target cannot be met, the plan comes as near as it can, and the summary says so. Raises CannotWork, with
    the nearest that fits, for a model that does not fit, before weights are read.
    """
    from meshwright.families import config_of_folder
    from meshwright.plan.constants import default_profile
    from meshwright.plan.serving import SERVERS, ServingQuery, Target, make_serving_plan

    model = config_of_folder(folder, ours=True)
    machine = _this_machine(free=True)
    query = ServingQuery(
        model.shape,
        machine,
        max(machine(1).devices, settings.tp or 1, _cores(machine(1))),
        SERVERS["meshwright"],
        default_profile(),
        _target(settings, model.longest),
        _pins(settings),
        _served_precision(model.precision, machine(1).device, ours=True),
        model.longest,
    )
    missed = ""
    try:
        plan = make_serving_plan(query)
    except CannotWork as error:
        if not query.target.goals:
            raise
        lengths = Target(query.target.prompt_tokens, query.target.output_tokens)
        plan = make_serving_plan(replace(query, target=lengths))
        missed = f"; {error.problems[0].what}, {error.problems[0].nearest}"
    chosen = plan.chosen
    complete = settings.model_copy(
        update={"tp": chosen.tp, "max_batch": chosen.max_batch, "max_len": settings.max_len or chosen.max_len}
    )
    return PlannedSettings(complete, chosen.precision, plan, _summary(plan) + missed)


def _summary(plan: ServingPlan) -> str:
    chosen, figures = plan.chosen, plan.chosen.predicted
    tokens = figures.tokens_per_second
    return (
        f"serving plan: tp {chosen.tp}, up to {chosen.max_batch} requests of {chosen.max_len} tokens at once, "
        f"{chosen.precision}; about {tokens.mid:,.0f} tokens/s at full load ({tokens.low:,.0f} to {tokens.high:,.0f}), "
        f"{figures.tpot_seconds.mid * 1e3:.3g} ms per token"
    )


def _target(serve: ServeSection, longest: int) -> Target:
    """The target of a [serve] section. Lengths default to usual ones, within the model's context."""
    from meshwright.plan.serving import Target
    from meshwright.plan.serving.result import USUAL_OUTPUT_TOKENS, USUAL_PROMPT_TOKENS

    room = min(longest, serve.max_len or longest)
    output = serve.output_tokens or max(1, min(USUAL_OUTPUT_TOKENS, (room - (serve.prompt_tokens or 0)) // 4))
    prompt = serve.prompt_tokens or max(1, min(USUAL_PROMPT_TOKENS, room - output))
    return Target(prompt, output, serve.ttft_seconds, serve.tpot_seconds, serve.requests_per_second)


def _pins(serve: ServeSection) -> ServingPins:
    from meshwright.plan.serving import ServingPins

    precision = None if serve.precision == "auto" else serve.precision
    return ServingPins(tp=serve.tp, max_batch=serve.max_batch, max_len=serve.max_len, precision=precision)


def _model_of_job(job: Job) -> ModelConfig:
    """The model to serve. For named devices a folder may hold any decoder that can be planned; for this machine it must
    be one that our engine serves."""
    from meshwright.families import config_of_folder, config_of_job

    if job.model.module is not None:
        what = "a module of yours cannot be served: the engine decodes the built-in families"
        raise CannotWork(Problem("model.module", what, 'nearest: family = "llama", or hf = "folder"'))
    if job.model.hf is not None:
        return config_of_folder(Path(job.model.hf), ours=job.cluster.named is None)
    return config_of_job(job)


def _served_precision(precision: str, device: Device, *, ours: bool) -> str:
    """The precision to serve weights saved in `precision`: for `ours` the one that the engine loads them as, else the
    nearest that the device computes in."""
    if ours:
        return "bf16" if precision == "bf16" else "fp32"
    if precision == "fp32":
        precision = "bf16"  # masters are kept in fp32
    return next(word for word in (precision, "bf16", "fp16", "fp32") if word in device.flops)


def _this_machine(*, free: bool = False) -> Callable[[int], Cluster]:
    """This machine as a cluster of `tp` processes, by tp; with `free`, they share the memory that is free now."""
    from meshwright.cluster import available_memory_bytes, this_machine

    free_bytes = available_memory_bytes() if free else None

    @cache
    def cluster_by_tp(tp: int) -> Cluster:
        cluster = this_machine(tp)
        if free_bytes is None or cluster.device.kind != "cpu":
            return cluster
        return replace(cluster, device=replace(cluster.device, memory_bytes=max(1, free_bytes // tp)))

    return cluster_by_tp


def _cores(cluster: Cluster) -> int:
    from meshwright.cluster import available_cores

    return available_cores() if cluster.device.kind == "cpu" else cluster.devices
