"""Estimates after a profile's corrections: what measured runs of the same kind have taught."""

from __future__ import annotations

from dataclasses import replace

from meshwright.plan.constants.regime import correction_factor
from meshwright.plan.cost.estimate import Estimate, Estimator
from meshwright.plan.cost.per_step import PerStepCost


def corrected(estimate: Estimate, estimator: Estimator) -> Estimate:
    """The estimate with all its seconds times the factor that the estimator's profile has learnt for such a run."""
    if not estimator.profile.corrections:
        return estimate
    factor = correction_factor(estimator.profile, estimator.workload, estimate.layout)
    return estimate if factor == 1.0 else scaled(estimate, factor)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate with all its seconds times `factor`."""

    def times(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value * factor for value in values)

    return replace(
        estimate,
        forward_seconds=times(estimate.forward_seconds),
        backward_seconds=times(estimate.backward_seconds),
        weight_seconds=times(estimate.weight_seconds),
        boundary_seconds=times(estimate.boundary_seconds),
        transfer_seconds=estimate.transfer_seconds * factor,
        compute_seconds=estimate.compute_seconds * factor,
        launch_seconds=estimate.launch_seconds * factor,
        communication_seconds=estimate.communication_seconds * factor,
        bubble_seconds=estimate.bubble_seconds * factor,
        optimizer_seconds=estimate.optimizer_seconds * factor,
        other_seconds=estimate.other_seconds * factor,
        step_seconds=estimate.step_seconds * factor,
        per_step=PerStepCost(estimate.per_step.gradients * factor, estimate.per_step.weights * factor),
    )
