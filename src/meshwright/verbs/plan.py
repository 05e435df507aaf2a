"""`plan`: the layout for a job; and the table of logical axes that every layout follows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import InputError, Problem
from meshwright.verbs.start import card_of_job, cluster_of_job, gather, groups_of_job, read_job

if TYPE_CHECKING:
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
) -> Plan:
    """The layout for a job, with what it will cost and why. Needs no data. Raises CannotWork where none fits.

    `framework` names the one that will run it, `objective` is "time" or "money", `profile` a file of constants.
    """
    from meshwright.plan import make_plan

    sound = read_job(job, overrides, data_must_exist=False, also=plan)
    constants = None if profile is None else profile_of(profile)
    request, style = request_of_job(sound, framework, objective), style_of(framework, sound.train.precision)
    if sound.cluster.groups:
        from meshwright.plan.mixed import make_mixed_plan

        card, mixed = gather(lambda: card_of_job(sound, style), lambda: groups_of_job(sound))
        return make_mixed_plan(card, mixed, request, constants)
    card, cluster = gather(lambda: card_of_job(sound, style), lambda: cluster_of_job(sound))
    return make_plan(card, cluster, request, constants)


def style_of(framework: str, precision: str) -> str:
    """How the framework's blocks compute, in words that a card knows."""
    if framework == "meshwright":
        return "plain"
    from meshwright.plan.cases.resolve import card_style
    from meshwright.plan.rules.frameworks import framework as row_of

    return card_style(framework, precision, None) + ("+fused_loss" if row_of(framework).fused_cross_entropy else "")


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
    """The constants to predict with: a file's, the data sheets', or those that are shipped."""
    from meshwright.plan.constants import DATASHEET, default_profile, load_profile

    if datasheet and profile is not None:
        raise InputError(Problem("command line", "--datasheet uses nothing fitted", "leave out --profile"))
    if datasheet:
        return DATASHEET
    return default_profile() if profile is None else load_profile(Path(profile))


def layout_table() -> dict[str, str | None]:
    """Logical axis of a parameter -> the mesh axis that splits it, None for never."""
    from meshwright.layout import AXIS_RULES

    return dict(AXIS_RULES)
