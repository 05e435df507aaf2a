"""The files of a run folder, read once for the page."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.plan import Plan
from meshwright.run import RunFolder

#: Fields that every kind of event has.
PLAIN_FIELDS = ("event", "time", "step", "not_finite")


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. `steps` holds the last event of each step. `plan` is None, and `job` empty, where
    the file does not exist."""

    name: str
    events: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    plan: Plan | None
    job_text: str
    job: Mapping[str, Any]

    @property
    def unit(self) -> str:
        """What throughput counts: "tokens" or "samples"."""
        if self.plan:
            return self.plan.unit
        return "samples" if self.job.get("task", {}).get("name") == "classification" else "tokens"

    @property
    def steps_of_job(self) -> int | None:
        steps = self.job.get("train", {}).get("steps")
        return steps if isinstance(steps, int) else None

    def last(self, kind: str) -> Mapping[str, Any] | None:
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    def points(self, field: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of a field of the step lines, where they have it."""
        return tuple((float(s["step"]), float(s[field])) for s in self.steps if is_number(s.get(field)))

    def after_warm_up(self, field: str) -> list[float]:
        """Values without the warm-up: the first twentieth of the steps, at least one where there are more."""
        values = [y for _, y in self.points(field) if math.isfinite(y)]
        return values[max(1, len(values) // 20) :] or values


def read_run(run: RunFolder) -> RunRecord:
    """Read a run folder. Raises InputError where it has none of the files, or a broken one."""
    if not any(path.exists() for path in (run.events, run.plan, run.job)):
        raise InputError(Problem(str(run.path), "is not a run folder: no events.jsonl, plan.json or job.toml in it"))
    plan = Plan.read(run.plan) if run.plan.exists() else None
    job_text, job = "", {}
    if run.job.exists():
        job_text = run.job.read_text(encoding="utf-8", errors="replace")
        try:
            job = tomllib.loads(job_text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(Problem(str(run.job), f"is not TOML: {error}")) from error
    events = run.read_events()
    evals = [event for event in events if event["event"] == "eval" and is_number(event.get("step"))]
    return RunRecord(run.path.resolve().name, events, run.steps(), evals, plan, job_text, job)


def is_number(value: Any) -> bool:
    """Whether a value of an event is a number (true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
