"""`plan`: the layout for a job, and the table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import InputError, Problem
from meshwright.verbs.start import card_of_job, cluster_of_job, gather, groups_of_job, read_job

if TYPE_CHECKING:
    from meshwright.cluster import Cluster
    from meshwright.job import Job
    from meshwright.plan import Plan, PlanRequest
    from meshwright.plan.constants import Profile


def plan(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    framework: str = "meshwright",
    objective: str = "time",
    profile: str | Path | None = None,
    cluster: Cluster | None = None,
) -> Plan:
    """The layout for a job, with its predicted time, memory and cost, and why. Needs no data.

    `framework` will run it, `objective` is "time" or "money", `profile` is a file of constants, `cluster` replaces the
    job's. Raises CannotWork where no layout fits.
    """
    from meshwright.plan import make_plan

    valid_job = read_job(job, overrides, data_must_exist=False, further_check=plan)
    constants = None if profile is None else profile_of(profile)
    request, style = request_of_job(valid_job, framework, objective), style_of(framework, valid_job.train.precision)
    if valid_job.cluster.groups:
        from meshwright.plan.mixed import make_mixed_plan

        card, mixed = gather(lambda: card_of_job(valid_job, style), lambda: groups_of_job(valid_job))
        return make_mixed_plan(card, mixed, request, constants)
    card, there = gather(lambda: card_of_job(valid_job, style), lambda: cluster or cluster_of_job(valid_job))
    return make_plan(card, there, request, constants)


def style_of(framework: str, precision: str) -> str:
    """How the framework computes a block: the `style` of a card."""
    if framework == "meshwright":
        return "plain"
    from meshwright.plan.cases.resolve import card_style
    from meshwright.plan.rules.frameworks import framework as row_of

    fused = row_of(framework).fused_cross_entropy
    return card_style(framework, precision, None) + ("+fused_loss" if fused else "")


def request_of_job(job: Job, framework: str, objective: str) -> PlanRequest:
    from meshwright.plan import PlanRequest

    return PlanRequest(
        global_batch=job.train.global_batch,
        precision=job.train.precision,
        pins=job.layout.pins(),
        steps=job.train.steps,
        compile=job.train.compile,
        origins=job.origins,
        objective=objective,
        framework=framework,
        spot=job.cluster.spot,
        failures_per_1000_node_days=job.cluster.failures_per_1000_node_days,
        checkpoint_every=job.checkpoint.every,
        asynchronous=job.checkpoint.asynchronous,
    )


def profile_of(profile: str | Path | None = None, *, datasheet: bool = False) -> Profile:
    """The constants to predict with: those of a file, of the data sheets, or the shipped ones."""
    from meshwright.plan.constants import DATASHEET, default_profile, load_profile

    if datasheet and profile is not None:
        raise InputError(Problem("command line", "--datasheet uses no profile", "leave out --profile"))
    if datasheet:
        return DATASHEET
    return default_profile() if profile is None else load_profile(Path(profile))


def layout_table() -> dict[str, str | None]:
    """Logical axis of a parameter -> the mesh axis that splits it, None for never."""
    from meshwright.layout import AXIS_RULES

    return dict(AXIS_RULES)
