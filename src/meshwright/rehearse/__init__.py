"""Rehearses chosen ranks of a layout: the real training step under fake tensors, for the bytes that each rank holds.

`rehearse` starts a process for it, so that the caller stays without torch.
"""

from meshwright.rehearse.peak import CATEGORIES, Peak
from meshwright.rehearse.rehearsal import RankPeak, Rehearsal, nearest_pins, ranks_to_rehearse, rehearse

__all__ = ["CATEGORIES", "Peak", "RankPeak", "Rehearsal", "nearest_pins", "ranks_to_rehearse", "rehearse"]
