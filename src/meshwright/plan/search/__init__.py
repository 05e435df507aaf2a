"""The best layout of a workload, the runners-up, what changes would save, and the nearest layout that works."""

from meshwright.plan.search.search import make_plan
from meshwright.plan.search.space import Space

__all__ = ["Space", "make_plan"]
