"""Rehearses ranks of a layout: runs the real training step on fake tensors, to find the peak memory of each rank.

`rehearse` starts a process for it, so that the caller does not load torch.
"""

from meshwright.rehearse.peak import CATEGORIES, Peak
from meshwright.rehearse.rehearsal import RankPeak, Rehearsal, ranks_to_rehearse, rehearse

__all__ = ["CATEGORIES", "Peak", "RankPeak", "Rehearsal", "ranks_to_rehearse", "rehearse"]
