"""`plan --exact`: a plan whose memory is checked by rehearsing some ranks of its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import CannotWork, InputError, Problem
from meshwright.verbs.plan import plan
from meshwright.verbs.start import cluster_of_job, read_job

if TYPE_CHECKING:
    from meshwright.cluster import Device
    from meshwright.job import Job
    from meshwright.layout import Layout
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
    """As `plan`, and rehearses `ranks` of the chosen layout (by default one rank of some stages).

    Raises CannotWork where the layout does not fit by the rehearsal, naming the first runner-up that does; InputError
    for ranks that the layout does not have, for another framework than ours, and for a cluster of mixed devices.
    """
    from meshwright.rehearse import rehearse

    valid_job = read_job(job, overrides, data_must_exist=False, further_check=plan)
    if framework != "meshwright":
        what = f"--exact runs our own code, not {framework}'s"
        raise InputError(Problem("command line: --exact", what, "leave out --exact, or --for"))
    if valid_job.cluster.groups:
        what = "--exact rehearses devices of one kind"
        raise InputError(Problem("command line: --exact", what, "leave it out, or give one group as [cluster]"))
    planned = plan(valid_job, framework=framework, objective=objective, profile=profile)
    device = cluster_of_job(valid_job).device
    exact = rehearse(valid_job, planned.chosen, device, ranks)
    if exact.fits:
        return ExactPlan(planned, exact)
    raise CannotWork(_too_large(valid_job, planned, exact, device))


def _too_large(job: Job, planned: Plan, exact: Rehearsal, device: Device) -> Problem:
    """How much memory is missing, and the first runner-up that fits."""
    from meshwright.cluster import GIB
    from meshwright.rehearse import rehearse

    worst, room = exact.worst, exact.room_bytes
    what = (
        f"does not fit: rank {worst.rank} needs {worst.device_bytes / GIB:.1f} GiB at its peak ({worst.peak.moment}), "
        f"{(worst.device_bytes - room) / GIB:.1f} GiB more than a device has for it"
    )
    nearest = "no runner-up fits either: more devices, or a smaller model"
    for other in planned.runners_up:
        if rehearse(job, other, device).fits:
            nearest = f"nearest that fits: {layout_overrides(other.layout, planned.chosen.layout)}"
            break
    return Problem(f"layout {planned.chosen.layout}", what, nearest)


def layout_overrides(layout: Layout, base: Layout) -> str:
    """The overrides that lead from the layout `base` to `layout`: "layout.tp=2 layout.dp=4"."""
    before = base.as_dict()
    changed = {name: value for name, value in layout.as_dict().items() if value != before[name]}
    return " ".join(f"layout.{name}={str(value).lower()}" for name, value in changed.items())
