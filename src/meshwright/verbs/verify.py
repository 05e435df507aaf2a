"""`verify`: train a layout and one device side by side, and compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.verbs.plan import plan
from meshwright.verbs.start import card_of_job, cluster_of_job, locate_problems, read_job

if TYPE_CHECKING:
    from meshwright.job import Job


def verify(job: Job | str | Path, overrides: Sequence[str] = (), *, steps: int = 20) -> dict[str, Any]:
    """Trains the job's layout and one device side by side. Raises LayoutsDisagree naming where they first differ."""
    from meshwright import families
    from meshwright import verify as verification

    job = read_job(job, overrides, further_check=plan)
    with locate_problems(job):
        families.require_trainable(job)
    return verification.run(job, card_of_job(job), cluster_of_job(job), steps=steps)
