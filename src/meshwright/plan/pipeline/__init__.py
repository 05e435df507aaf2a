"""The order of work of a pipeline: what each rank does, how long it takes, what it holds, where stages are cut."""

from meshwright.plan.pipeline.actions import TABLE
from meshwright.plan.pipeline.balance import balance_costs
from meshwright.plan.pipeline.in_flight import held_bytes
from meshwright.plan.pipeline.length import span_seconds

__all__ = ["TABLE", "balance_costs", "held_bytes", "span_seconds"]
