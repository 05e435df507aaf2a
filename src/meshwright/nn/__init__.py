"""The seams a model calls, as plain modules and functions: attention, rotary positions, cross-entropy; and how its
inputs come to a device."""

from meshwright.nn.attention import Attention, Rotary
from meshwright.nn.loss import Split, cross_entropy_sum
from meshwright.nn.transfer import to_device

__all__ = ["Attention", "Rotary", "Split", "cross_entropy_sum", "to_device"]
