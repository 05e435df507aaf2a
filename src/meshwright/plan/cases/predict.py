"""Step time and peak memory of a case, with the interval that the time is promised to lie in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshwright.errors import MeshwrightError
from meshwright.plan.cases.read import BadCase, Case
from meshwright.plan.cases.resolve import Setup, setup
from meshwright.plan.constants.profile import Profile, default_profile
from meshwright.plan.cost.estimate import Estimate, Estimator

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
            found = setup(case)
            outcome = self.outcome(found)
        except MeshwrightError as error:
            return {"id": case.id, "error": "; ".join(str(problem) for problem in error.problems)}
        factor = self.factor(found)
        mid = outcome.step_seconds * factor
        low, high = self.interval(found)
        answer = {
            "id": case.id,
            "step_seconds": {"low": mid * low, "mid": mid, "high": mid * high},
            "peak_allocated_gib": outcome.allocated_bytes / GIB,
            "peak_reserved_gib": outcome.reserved_bytes / GIB,
            "breakdown": {name: seconds * factor for name, seconds in outcome.breakdown.items()},
        }
        assumed = list(dict.fromkeys((*found.assumed, *self.profile.assumed)))
        return {**answer, "assumed": assumed} if assumed else answer

    def outcome(self, found: Setup) -> Outcome:
        """What a setup takes, before any correction. Where a share of the layers recomputes, that share of the way from
        a run without recompute to one with. Raises MeshwrightError where the layout cannot work."""
        plain = _outcome(self.estimate(found))
        if not found.recomputed:
            return plain
        full = _outcome(self.estimate(replace(found, layout=replace(found.layout, recompute="full"))))
        return plain.towards(full, found.recomputed)

    def seconds(self, found: Setup) -> float:
        """A step's seconds before any correction."""
        seconds = self.estimate(found).step_seconds
        if found.recomputed:
            full = self.estimate(replace(found, layout=replace(found.layout, recompute="full"))).step_seconds
            seconds += found.recomputed * (full - seconds)
        return seconds

    def estimate(self, found: Setup) -> Estimate:
        """The estimate of a setup, before any correction. Raises MeshwrightError where the layout cannot work."""
        if found.key not in self._estimators:
            if (other := self._others.get(found.key)) is None:
                asked = (found.card, found.cluster, found.global_batch, found.precision)
                other = Estimator(*asked, profile=self.profile, framework=found.framework)
            self._estimators[found.key] = other if other.profile is self.profile else other.with_profile(self.profile)
        return self._estimators[found.key].estimate(found.layout)

    def factor(self, found: Setup) -> float:
        """What the profile's correction multiplies the estimate's time by; 1 where it has learnt nothing."""
        correction = self.profile.corrections.get(found.correction_regime)
        return 1.0 if correction is None else correction.factor(found.features)

    def interval(self, found: Setup) -> tuple[float, float]:
        """Factors of the predicted time that bound its 90 % interval."""
        low, high = self.profile.interval(*found.regime)
        width = found.width * self.spread(found)
        return low**width, high**width

    def spread(self, found: Setup) -> float:
        """How unsure the correction is here, beside a place that it knows; 1 where there is none."""
        correction = self.profile.corrections.get(found.correction_regime)
        return 1.0 if correction is None else correction.spread(found.features) / correction.noise


def predictions(cases: Iterable[Case | BadCase], profile: Profile | None = None) -> Iterator[dict[str, Any]]:
    """An answer for each case, in order; a line that cannot be answered says why and stops no other."""
    predictor = Predictor(profile)
    for case in cases:
        yield {"id": case.id, "error": case.error} if isinstance(case, BadCase) else predictor.predict(case)
