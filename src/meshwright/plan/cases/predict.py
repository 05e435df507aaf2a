"""Step time with its 90 % interval, and peak memory, of a case."""

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
class CaseCost:
    """Seconds of a step, in all and in parts, and peak bytes of the fullest rank."""

    step_seconds: float
    allocated_bytes: float
    reserved_bytes: float
    breakdown: Mapping[str, float]

    @staticmethod
    def of(estimate: Estimate) -> CaseCost:
        allocated, reserved = (
            max(getattr(stage, name) for stage in estimate.memory) for name in ("allocated", "reserved")
        )
        return CaseCost(estimate.step_seconds, allocated, reserved, estimate.breakdown)

    def interpolated(self, other: CaseCost, share: float) -> CaseCost:
        """The cost at `share` of the way from this to `other`."""

        def between(a: float, b: float) -> float:
            return a + share * (b - a)

        return CaseCost(
            between(self.step_seconds, other.step_seconds),
            between(self.allocated_bytes, other.allocated_bytes),
            between(self.reserved_bytes, other.reserved_bytes),
            {name: between(seconds, other.breakdown[name]) for name, seconds in self.breakdown.items()},
        )


class Predictor:
    """Predicts cases by one profile. Cases that differ in layout alone share an estimator."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = default_profile() if profile is None else profile
        self._estimators: dict[str, Estimator] = {}
        self._others: Mapping[str, Estimator] = {}

    def with_profile(self, profile: Profile) -> Predictor:
        """A predictor with other constants. It shares what does not depend on them: fits ask for hundreds."""
        other = Predictor(profile)
        other._others = {**self._others, **self._estimators}
        return other

    def predict(self, case: Case) -> dict[str, Any]:
        """The answer to one case: {id, step_seconds, peak_allocated_gib, peak_reserved_gib, breakdown} or {id, error}.
        `assumed` lists what the case left open."""
        try:
            run = resolve(case)
            cost = self.cost(run)
        except MeshwrightError as error:
            return {"id": case.id, "error": "; ".join(str(problem) for problem in error.problems)}
        factor = self.factor(run)
        mid = cost.step_seconds * factor
        low, high = time_interval(self.profile, run.workload, run.layout, run.width)
        answer = {
            "id": case.id,
            "step_seconds": {"low": mid * low, "mid": mid, "high": mid * high},
            "peak_allocated_gib": cost.allocated_bytes / GIB,
            "peak_reserved_gib": cost.reserved_bytes / GIB,
            "breakdown": {name: seconds * factor for name, seconds in cost.breakdown.items()},
        }
        assumed = list(dict.fromkeys((*run.assumed, *self.profile.assumed)))
        return {**answer, "assumed": assumed} if assumed else answer

    def cost(self, run: ResolvedCase) -> CaseCost:
        """The cost before any correction. Where a share of the layers recomputes, it lies at that share between the
        costs without and with full recompute. Raises MeshwrightError where the layout cannot work."""
        plain = CaseCost.of(self.estimate(run))
        if not run.recomputed:
            return plain
        full = CaseCost.of(self.estimate(replace(run, layout=replace(run.layout, recompute="full"))))
        return plain.interpolated(full, run.recomputed)

    def seconds(self, run: ResolvedCase) -> float:
        """Seconds of a step before any correction."""
        return self.cost(run).step_seconds if run.recomputed else self.estimate(run).step_seconds

    def estimate(self, run: ResolvedCase) -> Estimate:
        """The estimate of a case, before any correction. Raises MeshwrightError where the layout cannot work."""
        key = run.workload.key
        if key not in self._estimators:
            other = self._others.get(key)
            self._estimators[key] = other.with_profile(self.profile) if other else Estimator(run.workload, self.profile)
        return self._estimators[key].estimate(run.layout)

    def factor(self, run: ResolvedCase) -> float:
        """The profile's correction of the estimated time; 1 where the regime has none."""
        return correction_factor(self.profile, run.workload, run.layout)


def predictions(cases: Iterable[Case | BadCase], profile: Profile | None = None) -> Iterator[dict[str, Any]]:
    """An answer for each case, in order; a bad case is answered with its error."""
    predictor = Predictor(profile)
    for case in cases:
        yield {"id": case.id, "error": case.error} if isinstance(case, BadCase) else predictor.predict(case)
