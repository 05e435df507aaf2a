"""Copies from the host to a device that nothing waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshwright.nn.device import GPU_TYPES


def to_device(values: Any, device: torch.device | str) -> Tensor:
    """An array or tensor of the host as a tensor on `device`; on the CPU it shares the memory.

    A copy to a GPU is from pinned memory and queued like any other work. From pageable memory the host would wait until
    all the work before it is done (CUDA C++ Best Practices Guide, "Asynchronous and Overlapping Transfers").
    """
    tensor = torch.as_tensor(values)
    if torch.device(device).type in GPU_TYPES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
