"""Estimates after a profile's corrections: what measured runs of the same kind have taught."""

from __future__ import annotations

from dataclasses import replace

from meshwright.layout import Layout
from meshwright.plan.constants.correction import Correction
from meshwright.plan.cost.estimate import Estimate, Estimator
from meshwright.plan.cost.per_step import Once
from meshwright.plan.search.space import Space


def corrected(estimate: Estimate, space: Space, estimator: Estimator) -> Estimate:
    """The estimate with all its seconds times the factor that the estimator's profile has learnt for such a run."""
    known, features = _learnt(estimate.layout, space, estimator)
    return estimate if known is None else scaled(estimate, known.factor(features))


def factors(layout: Layout, space: Space, estimator: Estimator) -> tuple[float, float]:
    """Factors of a predicted time that bound its 90 % interval: wider where a correction reaches far."""
    extent = "nodes" if space.cluster.nodes > 1 else "node"
    low, high = estimator.profile.interval(space.cluster.device.kind, estimator.framework.name, extent)
    known, features = _learnt(layout, space, estimator)
    width = 1.0 if known is None else known.spread(features) / known.noise
    return low**width, high**width


def _learnt(layout: Layout, space: Space, estimator: Estimator) -> tuple[Correction | None, tuple[float, ...]]:
    if not estimator.profile.corrections:
        return None, ()
    from meshwright.plan.cases.resolve import Setup

    asked = Setup(space.card, space.cluster, layout, space.global_batch, estimator.precision, estimator.framework)
    return estimator.profile.corrections.get(asked.correction_regime), asked.features


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
        once=Once(estimate.once.gradients * factor, estimate.once.weights * factor),
    )
