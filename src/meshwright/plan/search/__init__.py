"""The best of all layouts of a workload, what came next, what a change would save, and what works where none does."""

from meshwright.plan.search.search import make_plan
from meshwright.plan.search.space import Space

__all__ = ["Space", "make_plan"]
