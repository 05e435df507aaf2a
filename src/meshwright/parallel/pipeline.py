"""The pipeline: torch's schedules around this rank's stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from meshwright.parallel.apply import ParallelModel
from meshwright.parallel.mesh import Mesh

#: Layout.schedule -> torch's schedule.
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class _Stage(PipelineStage):
    """torch's stage. To learn shapes, it also passes invented values through its module: in the first step, and again
    when training and evaluation take turns. Such a pass sees copies of the module's buffers, so that running
    statistics stay what real values made them."""

    def __init__(self, module: nn.Module, *arguments: Any, **options: Any) -> None:
        super().__init__(module, *arguments, **options)
        self._real = False
        self._kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        module.register_forward_pre_hook(self._lend_copies)
        module.register_forward_hook(self._take_back, always_call=True)

    def forward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        self._real = True
        try:
            return super().forward_one_chunk(*arguments, **options)
        finally:
            self._real = False

    def _lend_copies(self, module: nn.Module, *_: object) -> None:
        if not self._real:
            self._kept = [(child, dict(child._buffers)) for child in module.modules()]
            for child, buffers in self._kept:
                child._buffers.update({name: one.clone() for name, one in buffers.items() if one is not None})

    def _take_back(self, *_: object) -> None:
        for child, buffers in self._kept:
            child._buffers.update(buffers)
        self._kept = []


class Pipeline:
    """Runs forward and backward of a step's micro-batches through the stages.

    `loss` maps (output, targets) of one micro-batch to a scalar, on the last stage only. It must be pure: torch calls
    it once more on invented values, to learn the shapes.
    """

    def __init__(
        self,
        model: ParallelModel,
        mesh: Mesh,
        micro_batches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        boundary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`boundary` is an example input and output of this stage for one micro-batch; without it the stages exchange
        shapes when they first run."""
        self._mesh = mesh
        x, output = boundary or (None, None)
        stage = _Stage(model.module, mesh.at.pp, mesh.layout.pp, mesh.device, x, output, group=mesh.pp_group)
        schedule = SCHEDULES[mesh.layout.schedule]
        self._schedule = schedule(stage, micro_batches, loss_fn=loss, scale_grads=False)

    def step(self, x: Tensor, inputs: Mapping[str, Tensor], targets: Tensor) -> list[Tensor]:
        """Accumulates gradients over x [micro_batches x micro_batch, ...]; inputs and targets are cut the same way.

        Returns the losses of the micro-batches on the last stage, nothing elsewhere.
        """
        return self._run(self._schedule.step, x, inputs, targets)

    @torch.no_grad()
    def evaluate(self, x: Tensor, inputs: Mapping[str, Tensor], targets: Tensor) -> list[Tensor]:
        """Forward only; returns as `step` does."""
        return self._run(self._schedule.eval, x, inputs, targets)

    def _run(
        self, run: Callable[..., object], x: Tensor, inputs: Mapping[str, Tensor], targets: Tensor
    ) -> list[Tensor]:
        arguments = (x,) if self._mesh.first_stage else ()
        losses: list[Tensor] = []
        # No outputs: torch would keep the logits of every micro-batch and join them.
        if self._mesh.last_stage:
            run(*arguments, target=targets, losses=losses, return_outputs=False, **inputs)
        else:
            run(*arguments, return_outputs=False, **inputs)
        return losses
