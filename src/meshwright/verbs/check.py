"""`check`: every problem of a job, its data and its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError
from meshwright.verbs.plan import plan
from meshwright.verbs.start import gather, locate_problems, read_job

if TYPE_CHECKING:
    from meshwright.data import Survey
    from meshwright.job import Job


def check(job: Job | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the job, its model and its data, and plans it: {"model", "parameters", "layout", "plan", "data": {...}}.

    Raises InputError, or CannotWork where only the plan fails, with every problem.
    """
    valid_job = read_job(job, overrides, further_check=plan)
    survey, planned = gather(lambda: _survey(valid_job), lambda: plan(valid_job))
    return {
        "model": planned.model,
        "parameters": planned.parameters,
        "layout": planned.chosen.layout.as_dict(),
        "plan": f"{planned.chosen.layout} on {planned.cluster}",
        "data": {key: value for key, value in asdict(survey).items() if key != "problems"},
    }


def _survey(job: Job) -> Survey:
    from meshwright import data

    with locate_problems(job):
        survey = data.survey(job)
        if survey.problems:
            raise InputError(survey.problems)
    return survey
