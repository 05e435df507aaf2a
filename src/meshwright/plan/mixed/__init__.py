"""One plan for several kinds of device."""

from meshwright.plan.mixed.cluster import MixedCluster
from meshwright.plan.mixed.ways import make_mixed_plan

__all__ = ["MixedCluster", "make_mixed_plan"]
