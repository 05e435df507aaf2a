"""AdamW over this rank's shards, the learning-rate schedule, and the norm of a sharded gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel import Mesh, ParallelModel
from meshwright.placement import Placement

if TYPE_CHECKING:
    from meshwright.job.sections import TrainSection


def learning_rate(step: int, train: TrainSection) -> float:
    """The rate of `step` (from 1): linear warm-up, then cosine, WSD (arXiv 2405.18392) or constant."""
    peak, floor = train.lr, train.lr * train.min_lr_ratio
    warmup: int = train.warmup_steps
    if step <= warmup:
        return float(peak * step / warmup)
    if train.decay == "constant":
        return float(peak)
    if train.decay == "cosine":
        done = (step - warmup) / max(train.steps - warmup, 1)
        return float(floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    decay_steps = max(round(train.steps * train.decay_fraction), 1)
    left = min((train.steps - step) / decay_steps, 1.0)
    return float(floor + (peak - floor) * max(left, 0.0))


#: The tensors that AdamW keeps of each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_names(names: Iterable[str]) -> list[str]:
    """The names under which a checkpoint has the moments of these parameters."""
    return [f"{moment}.{name}" for name in names for moment in MOMENTS]


class Optimizer:
    """AdamW on the plain local tensors of `model`. Parameters of two or more dimensions decay, vectors do not."""

    def __init__(self, model: ParallelModel, train: TrainSection, device: torch.device) -> None:
        self._model = model
        self.parameters = {
            name: model.local(name).detach()
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad and model.placements[name].box.elements
        }
        shares = [1.0 / model.placements[name].replicas for name in self.parameters]
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)
        decays: list[Tensor] = []
        stays: list[Tensor] = []
        for name, local in self.parameters.items():
            (decays if len(model.placements[name].box.global_shape) >= 2 else stays).append(local)
        # Groups may be empty, even all of them: a rank may hold no element of any parameter.
        self._adamw = torch.optim.AdamW(
            [{"params": decays, "weight_decay": train.weight_decay}, {"params": stays, "weight_decay": 0.0}],
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        for local in self.parameters.values():
            self._adamw.state[local] = {
                "step": torch.zeros((), dtype=torch.float32, device=local.device),
                **{moment: torch.zeros_like(local) for moment in MOMENTS},
            }

    def collect(self) -> None:
        """Takes this step's gradients; a parameter that the loss did not touch gets zeros, as on one device."""
        for name, local in self.parameters.items():
            gradient = self._model.local_gradient(name)
            local.grad = torch.zeros_like(local) if gradient is None else gradient

    def gradients(self) -> list[Tensor]:
        return list(self.named_gradients().values())

    def named_gradients(self) -> dict[str, Tensor]:
        return {name: local.grad for name, local in self.parameters.items() if local.grad is not None}

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm, an fp64 scalar: summed over all ranks, every element counts
        once."""
        if not self.parameters:
            return self._shares.sum()
        return (torch.stack(torch._foreach_norm(self.gradients())).double().square() * self._shares).sum()

    def step(self, rate: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()

    def clear(self) -> None:
        for local in self.parameters.values():
            local.grad = None
        self._model.module.zero_grad(set_to_none=True)

    def state_tensors(self) -> list[Tensor]:
        """Every tensor of the state: moments and counts of updates."""
        return [value for state in self._adamw.state.values() for value in state.values()]

    def state(self) -> dict[str, tuple[Placement, Tensor]]:
        """The moments by name, for a checkpoint to write or fill."""
        entries = {}
        for name, local in self.parameters.items():
            row = self._model.placements[name]
            for moment, moment_name in zip(MOMENTS, moment_names([row.name]), strict=True):
                entry = dataclasses.replace(row, name=moment_name)
                entries[entry.name] = (entry, self._adamw.state[local][moment])
        return entries

    def set_step(self, step: int) -> None:
        """The number of updates made so far, which AdamW's bias correction needs."""
        for local in self.parameters.values():
            self._adamw.state[local]["step"].fill_(step)


def complete_gradients(model: ParallelModel, optimizer: Optimizer, mesh: Mesh) -> None:
    """Sums partial gradients: over tensor-parallel ranks, and over the two pipeline ends that share a tied weight."""
    gradients = [(model.placements[name], gradient) for name, gradient in optimizer.named_gradients().items()]
    _all_reduce_together([gradient for row, gradient in gradients if "tp" in row.partial], mesh.tp_group)
    for row, gradient in sorted(gradients, key=lambda pair: pair[0].name):
        if "ends" in row.partial:
            dist.all_reduce(gradient, group=mesh.ends)


def _all_reduce_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
