"""Writes every step's gradients and buffers, so that `verify` can name the first tensor that differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from meshwright.parallel import Mesh, ParallelModel
from meshwright.train.loop import Record


def recorder(folder: str, model: ParallelModel, mesh: Mesh) -> Record:
    """A Record that writes step-N/rank-K.safetensors: the boxes this rank owns, scaled to the true gradient.

    Each file's metadata has `boxes`, JSON of {name: {"start": [...], "global_shape": [...]}}. The persistent buffers
    that it owns, as the step's forward passes left them, are in step-N/buffers-K.safetensors.
    """
    root = Path(folder)

    def record(step: int, gradients: Mapping[str, Tensor], correction: float) -> None:
        tensors, boxes = {}, {}
        for name, gradient in gradients.items():
            row = model.placements[name]
            if row.owner:
                tensors[row.name] = (gradient * correction).to("cpu", torch.float32).contiguous()
                boxes[row.name] = {"start": row.box.start, "global_shape": row.box.global_shape}
        place = root / f"step-{step}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / f"rank-{mesh.rank}.safetensors", metadata={"boxes": json.dumps(boxes)})
        buffers = {name: buffer.cpu() for name, buffer in model.buffers.items() if model.placements[name].owner}
        save_file(buffers, place / f"buffers-{mesh.rank}.safetensors")

    return record
