"""The strategies and tools that suit a job, in words."""

from meshwright.plan.advice.strategies import DataVolume, FrameworkPlan
from meshwright.plan.advice.tools import Advice, advise, frameworks, situation_of

__all__ = ["Advice", "DataVolume", "FrameworkPlan", "advise", "frameworks", "situation_of"]
