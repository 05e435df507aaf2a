"""The seams a model calls, as plain modules and functions: attention, rotary positions, cross-entropy."""

from meshwright.nn.attention import Attention, Rotary
from meshwright.nn.loss import Split, cross_entropy_sum

__all__ = ["Attention", "Rotary", "Split", "cross_entropy_sum"]
