"""Which strategies and tools suit a job, in words."""

from meshwright.plan.advice.strategies import DataVolume, FrameworkPlan
from meshwright.plan.advice.tools import Advice, advise, frameworks, situation

__all__ = ["Advice", "DataVolume", "FrameworkPlan", "advise", "frameworks", "situation"]
