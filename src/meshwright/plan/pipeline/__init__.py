"""Pipeline schedules: each rank's actions, their length, activations in flight, and stages of equal cost."""

from meshwright.plan.pipeline.actions import TABLE
from meshwright.plan.pipeline.balance import balance_costs
from meshwright.plan.pipeline.in_flight import peak_activation_bytes
from meshwright.plan.pipeline.length import span_seconds

__all__ = ["TABLE", "balance_costs", "peak_activation_bytes", "span_seconds"]
