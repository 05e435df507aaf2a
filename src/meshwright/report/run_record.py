"""The files of a run folder, read once for the page."""

from __future__ import annotations

import sys
import tomllib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.plan import Plan
from meshwright.run import RunFolder

#: Fields that every kind of event has.
PLAIN_FIELDS = ("event", "time", "step", "not_finite")
#: Fields of step events that the page shows.
STEP_FIELDS = ("loss", "grad_norm", "tokens_per_second", "step_seconds", "peak_bytes")
MISSING = -sys.float_info.max
#: Points beyond this number are joined to means of neighbours: many times what a chart shows.
MOST_EXACT = 20_000


class Steps:
    """The step events as columns of numbers, since a run has millions; where a step was repeated, its last event."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self._steps = array("d")
        self._columns = {field: array("d") for field in STEP_FIELDS}
        for event in events:
            self.append(event)

    def append(self, event: Mapping[str, Any]) -> None:
        self._steps.append(event["step"])
        for field, column in self._columns.items():
            value = event.get(field)
            column.append(value if type(value) is float or type(value) is int else MISSING)

    def column(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(step, value) of a field, in the order of steps, where the events have it."""
        if field not in self._columns:
            raise KeyError(field)
        last = self._last_of_each_step()
        steps, values = np.asarray(self._steps)[last], np.asarray(self._columns[field])[last]
        there = values != MISSING
        return steps[there], values[there]

    @property
    def last_step(self) -> int | None:
        return int(max(self._steps)) if self._steps else None

    def _last_of_each_step(self) -> np.ndarray | slice:
        steps = np.asarray(self._steps)
        if bool((np.diff(steps) > 0).all()):
            return slice(None)
        return len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. `events` are those that are no step's. `plan` is None, and `job` empty, where the
    file does not exist. `times` are those of the first event and of the last, () without one."""

    name: str
    events: Sequence[Mapping[str, Any]]
    steps: Steps
    times: tuple[float, ...]
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
        """(step, value) of a field of STEP_FIELDS, where the steps have it. Of a long run the means of neighbours, with
        the first and the last as they are; a run of neighbours without a finite value keeps its first."""
        steps, values = self.steps.column(field)
        if len(steps) <= MOST_EXACT:
            return tuple(zip(steps.tolist(), values.tolist(), strict=True))
        size = -(-len(steps) // MOST_EXACT)
        begins = np.arange(1, len(steps) - 1, size)
        finite = np.isfinite(values[:-1])
        counts = np.add.reduceat(finite, begins, dtype=np.int64)
        sums = np.add.reduceat(np.where(finite, values[:-1], 0.0), begins)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), values[begins])  # like `charts.thinned`
        last_steps = steps[np.minimum(begins + size, len(steps) - 1) - 1]
        inner = zip(last_steps.tolist(), means.tolist(), strict=True)
        return ((float(steps[0]), float(values[0])), *inner, (float(steps[-1]), float(values[-1])))

    def after_warm_up(self, field: str) -> list[float]:
        """Values without the warm-up: the first twentieth of the steps, at least one where there are more."""
        values = self.steps.column(field)[1]
        values = values[np.isfinite(values)]
        later: list[float] = values[max(1, len(values) // 20) :].tolist()
        return later or values.tolist()


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
    events: list[Mapping[str, Any]] = []
    steps, times = Steps(), list[float]()
    for event in run.each_event():
        steps.append(event) if event["event"] == "step" else events.append(event)
        if is_number(event.get("time")):
            times[1:] = [event["time"]]  # the first and the latest
    evals = [event for event in events if event["event"] == "eval" and is_number(event.get("step"))]
    return RunRecord(run.path.resolve().name, events, steps, tuple(times), evals, plan, job_text, job)


def is_number(value: Any) -> bool:
    """Whether a value of an event is a number (true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
