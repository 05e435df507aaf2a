"""`plan --exact`: the plan, with chosen ranks of its layout rehearsed before it is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem
from meshwright.verbs.plan import plan
from meshwright.verbs.start import cluster_of_job, read_job

if TYPE_CHECKING:
    from meshwright.job import Job
    from meshwright.plan import Plan
    from meshwright.rehearse import Rehearsal


@dataclass(frozen=True)
class ExactPlan:
    """A plan and the rehearsal of its chosen layout."""

    plan: Plan
    exact: Rehearsal

    def as_dict(self) -> dict[str, Any]:
        """The plan's JSON, with the rehearsal under chosen.exact."""
        whole = self.plan.as_dict()
        return {**whole, "chosen": {**whole["chosen"], "exact": self.exact.as_dict()}}


def plan_exact(
    job: Job | str | Path,
    overrides: Sequence[str] = (),
    *,
    ranks: Sequence[int] | None = None,
    framework: str = "meshwright",
    objective: str = "time",
    profile: str | Path | None = None,
) -> ExactPlan:
    """As `plan`; then `ranks` of the chosen layout (by default one each of some stages) are rehearsed.

    Raises CannotWork where the layout does not fit by what the rehearsal found, naming the first runner-up that does;
    InputError for ranks that it does not have, another framework than ours, or a cluster of mixed devices.
    """
    from meshwright.rehearse import rehearse

    sound = read_job(job, overrides, data_must_exist=False, also=plan)
    if framework != "meshwright":
        what = f"--exact runs our own code, not {framework}'s"
        raise InputError(Problem("command line: --exact", what, "leave out --exact, or --for"))
    if sound.cluster.groups:
        what = "--exact rehearses devices of one kind"
        raise InputError(Problem("command line: --exact", what, "leave it out, or give one group as [cluster]"))
    planned = plan(sound, framework=framework, objective=objective, profile=profile)
    device = cluster_of_job(sound).device
    exact = rehearse(sound, planned.chosen, device, ranks)
    if exact.fits:
        return ExactPlan(planned, exact)
    raise CannotWork(_too_large(sound, planned, exact, device))


def _too_large(job: Job, planned: Plan, exact: Rehearsal, device: Any) -> Problem:
    """What the rehearsal found to be too much, and the first runner-up that fits."""
    from meshwright.cluster import GIB
    from meshwright.rehearse import nearest_pins, rehearse

    worst, room = exact.worst, exact.room_bytes
    what = (
        f"does not fit: rank {worst.rank} needs {worst.device_bytes / GIB:.1f} GiB at its worst ({worst.peak.moment}), "
        f"{(worst.device_bytes - room) / GIB:.1f} GiB more than there is room for"
    )
    nearest = "no runner-up fits either: more devices, or a smaller model"
    for other in planned.runners_up:
        found = rehearse(job, other, device)
        if found.fits:
            nearest = f"nearest that fits: {nearest_pins(found, planned.chosen.layout)}"
            break
    return Problem(f"layout {planned.chosen.layout}", what, nearest)
