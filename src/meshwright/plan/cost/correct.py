"""Estimates multiplied by a profile's corrections, which are learnt from measured runs."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from meshwright.plan.constants.regime import correction_factor
from meshwright.plan.cost.estimate import Estimate, Estimator
from meshwright.plan.cost.per_step import PerStepCost


def corrected(estimate: Estimate, estimator: Estimator) -> Estimate:
    """The estimate with all its seconds times the factor that the estimator's profile has learnt for such runs."""
    if not estimator.profile.corrections:
        return estimate
    factor = correction_factor(estimator.profile, estimator.workload, estimate.layout)
    return estimate if factor == 1.0 else scaled(estimate, factor)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate with all its seconds times `factor`."""
    changes: dict[str, Any] = {}
    for name in (field.name for field in fields(estimate) if field.name.endswith("_seconds")):
        seconds = getattr(estimate, name)
        changes[name] = tuple(s * factor for s in seconds) if isinstance(seconds, tuple) else seconds * factor
    per_step = PerStepCost(estimate.per_step.gradients * factor, estimate.per_step.weights * factor)
    return replace(estimate, **changes, per_step=per_step)
