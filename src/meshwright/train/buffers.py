"""Persistent buffers keep the shape and type with which they were registered, whatever a forward pass makes of them."""

from __future__ import annotations

import torch

from meshwright.errors import Problem, RunFailed
from meshwright.parallel import ParallelModel


class BufferTypes:
    """The types of a model's persistent buffers as they are registered, which a checkpoint of it has."""

    def __init__(self, model: ParallelModel) -> None:
        self._model = model
        self._types = {name: buffer.dtype for name, buffer in model.buffers.items()}

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """Casts each buffer that `step` put in place of another type back to the registered one.

        Arithmetic in bf16 gives `self.last = x.mean(0)` another type than the trace in fp32 saw. A resumed run reads
        the registered type, so the run that goes on uses it as well. Raises RunFailed, naming the buffer, where the
        step removed it or changed its shape.
        """
        for name, dtype in self._types.items():
            path, _, leaf = name.rpartition(".")
            owner, wanted = self._model.module.get_submodule(path), self._model.placements[name].box.shape
            buffer = owner._buffers.get(leaf)
            if buffer is None or tuple(buffer.shape) != wanted:
                now = "is gone" if buffer is None else f"has shape {list(buffer.shape)}"
                what = f"the buffer '{name}' {now}, and was registered with shape {list(wanted)}"
                near = "write to it by self.NAME.copy_(value), or register it with persistent=False"
                raise RunFailed(Problem(f"step {step}", what, near))
            if buffer.dtype != dtype:
                owner._buffers[leaf] = buffer.detach().to(dtype)
