"""The device that a rank computes on, and what its ranks communicate by: one code for every maker that torch has.

"cuda" is NVIDIA's GPUs and, in torch's ROCm build, AMD's; "xpu" is Intel's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

GPU_TYPES = ("cuda", "xpu")


def gpu_type() -> str | None:
    """The type of this machine's GPUs, or None where torch uses none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in GPU_TYPES else None


def take_device(index: int) -> torch.device:
    """The GPU of that index, counted round, made the current one; the CPU where there is none."""
    kind = gpu_type()
    if kind is None:
        return torch.device("cpu")
    device = torch.device(kind, index % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device.index)
    return device


def backend(device: torch.device) -> str:
    """The backend for process groups of ranks on such devices: gloo, and beside it NCCL (RCCL in a ROCm build) or XCCL
    for GPUs."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
