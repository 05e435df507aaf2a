"""Seconds and bytes of one layout: per block, per stage and per step."""

from meshwright.plan.cost.estimate import Estimate, Estimator
from meshwright.plan.cost.memory import MemoryModel, StageMemory, usable_bytes

__all__ = ["Estimate", "Estimator", "MemoryModel", "StageMemory", "usable_bytes"]
