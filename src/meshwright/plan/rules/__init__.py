"""Which layouts cannot work: a table of rules over a layout, a model and the framework that runs it."""

from meshwright.plan.rules.frameworks import FRAMEWORKS, Framework
from meshwright.plan.rules.query import LayoutQuery, ModelFacts, Refusal
from meshwright.plan.rules.table import RULES, allowed, refusals

__all__ = ["FRAMEWORKS", "RULES", "Framework", "LayoutQuery", "ModelFacts", "Refusal", "allowed", "refusals"]
