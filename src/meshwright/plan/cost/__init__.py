"""Seconds and bytes of one layout: of a block, of a stage, of what happens once a step."""

from meshwright.plan.cost.estimate import Estimate, Estimator
from meshwright.plan.cost.memory import MemoryModel, StageMemory, usable_bytes

__all__ = ["Estimate", "Estimator", "MemoryModel", "StageMemory", "usable_bytes"]
