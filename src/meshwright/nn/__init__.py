"""The seams a model calls, as plain modules and functions: attention, rotary positions, cross-entropy; and how its
inputs come to a device, and which device that is."""

from meshwright.nn.attention import Attention, Rotary
from meshwright.nn.device import GPU_TYPES, backend, gpu_type, take_device
from meshwright.nn.loss import Split, cross_entropy_sum
from meshwright.nn.transfer import to_device

__all__ = [
    "GPU_TYPES",
    "Attention",
    "Rotary",
    "Split",
    "backend",
    "cross_entropy_sum",
    "gpu_type",
    "take_device",
    "to_device",
]
