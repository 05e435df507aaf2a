"""Step time and peak memory of a case, with the interval that the time is promised to lie in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshwright.errors import MeshwrightError
from meshwright.plan.cases.read import BadCase, Case
from meshwright.plan.cases.resolve import ResolvedCase, resolve
from meshwright.plan.constants import Profile, default_profile
from meshwright.plan.constants.regime import correction_factor, time_interval
from meshwright.plan.cost import Estimate, Estimator

GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What a run takes: seconds of a step, in all and in parts, and bytes of its worst rank."""

    step_seconds: float
    allocated_bytes: float
    reserved_bytes: float
    breakdown: Mapping[str, float]

    def towards(self, other: Outcome, share: float) -> Outcome:
        """The outcome `share` of the way to another."""

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        return Outcome(
            between(self.step_seconds, other.step_seconds),
            between(self.allocated_bytes, other.allocated_bytes),
            between(self.reserved_bytes, other.reserved_bytes),
            {name: between(seconds, other.breakdown[name]) for name, seconds in self.breakdown.items()},
        )


def _outcome(estimate: Estimate) -> Outcome:
    return Outcome(
        estimate.step_seconds,
        max(stage.allocated for stage in estimate.memory),
        max(stage.reserved for stage in estimate.memory),
        estimate.breakdown,
    )


class Predictor:
    """Predicts cases by one profile. Cases that differ in layout alone share what was computed for the others."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = default_profile() if profile is None else profile
        self._estimators: dict[str, Estimator] = {}
        self._others: Mapping[str, Estimator] = {}

    def with_profile(self, profile: Profile) -> Predictor:
        """A predictor by other constants, which shares what does not depend on them: fits ask for hundreds."""
        other = Predictor(profile)
        other._others = {**self._others, **self._estimators}
        return other

    def predict(self, case: Case) -> dict[str, Any]:
        """The contract's answer to one case: {id, step_seconds, peak_allocated_gib, peak_reserved_gib, breakdown} or
        {id, error}. `assumed` lists what the case left open."""
        try:
            run = resolve(case)
            outcome = self.outcome(run)
        except MeshwrightError as error:
            return {"id": case.id, "error": "; ".join(str(problem) for problem in error.problems)}
        factor = self.factor(run)
        mid = outcome.step_seconds * factor
        low, high = time_interval(self.profile, run.workload, run.layout, run.width)
        answer = {
            "id": case.id,
            "step_seconds": {"low": mid * low, "mid": mid, "high": mid * high},
            "peak_allocated_gib": outcome.allocated_bytes / GIB,
            "peak_reserved_gib": outcome.reserved_bytes / GIB,
            "breakdown": {name: seconds * factor for name, seconds in outcome.breakdown.items()},
        }
        assumed = list(dict.fromkeys((*run.assumed, *self.profile.assumed)))
        return {**answer, "assumed": assumed} if assumed else answer

    def outcome(self, run: ResolvedCase) -> Outcome:
        """What a case takes, before any correction. Where a share of the layers recomputes, that share of the way from
        a run without recompute to one with. Raises MeshwrightError where the layout cannot work."""
        plain = _outcome(self.estimate(run))
        if not run.recomputed:
            return plain
        full = _outcome(self.estimate(replace(run, layout=replace(run.layout, recompute="full"))))
        return plain.towards(full, run.recomputed)

    def seconds(self, run: ResolvedCase) -> float:
        """A step's seconds before any correction."""
        seconds = self.estimate(run).step_seconds
        if run.recomputed:
            full = self.estimate(replace(run, layout=replace(run.layout, recompute="full"))).step_seconds
            seconds += run.recomputed * (full - seconds)
        return seconds

    def estimate(self, run: ResolvedCase) -> Estimate:
        """The estimate of a case, before any correction. Raises MeshwrightError where the layout cannot work."""
        key = run.workload.key
        if key not in self._estimators:
            other = self._others.get(key) or Estimator(run.workload, self.profile)
            self._estimators[key] = other if other.profile is self.profile else other.with_profile(self.profile)
        return self._estimators[key].estimate(run.layout)

    def factor(self, run: ResolvedCase) -> float:
        """What the profile's correction multiplies the estimate's time by; 1 where it has learnt nothing."""
        return correction_factor(self.profile, run.workload, run.layout)


def predictions(cases: Iterable[Case | BadCase], profile: Profile | None = None) -> Iterator[dict[str, Any]]:
    """An answer for each case, in order; a line that cannot be answered says why and stops no other."""
    predictor = Predictor(profile)
    for case in cases:
        yield {"id": case.id, "error": case.error} if isinstance(case, BadCase) else predictor.predict(case)
