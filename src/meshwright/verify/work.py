"""What every process of a verification does: the same steps once or twice, with every step's gradients recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from meshwright.errors import CannotWork, Problem
from meshwright.job import load_job
from meshwright.launch import Context
from meshwright.parallel import ParallelModel, start
from meshwright.plan import Plan
from meshwright.run import RunFolder
from meshwright.train.loop import BatchReader, Record
from meshwright.train.rank_files import RankFiles
from meshwright.train.recorder import recorder
from meshwright.train.work import Session


def work(payload: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains the run in folder `payload["run"]` once for each of `payload["passes"]`, each from the first values.

    A pass is {"record": folder of its gradients, "reversed": the samples of each batch in reverse order, "save": folder
    where the weights before each step are written (by one device), "load": such a folder to begin each step from}.
    Returns {"losses": those of each pass by step, "dropout": whether the model has dropout, which is left out}. Raises
    CannotWork for a model that draws random numbers in other ways.
    """
    run = RunFolder(payload["run"])
    job, plan = load_job(run.job, data_must_exist=False), Plan.read(run.plan)
    torch.set_flush_denormal(True)
    losses: list[list[float]] = []
    dropout = False
    with start(plan.chosen.layout, context, timeout_seconds=job.launch.timeout_seconds) as mesh:
        for one in payload["passes"]:
            trainer = Session(job, plan, RankFiles(run), mesh, resume=False).trainer
            dropout = _without_dropout(trainer.model.module)
            if context.world == 1:
                refuse_random_numbers(trainer.model.module)
            if one.get("reversed"):
                trainer.batch = _reversed(trainer.batch, job.train.global_batch)
            record: Record | None = recorder(one["record"], trainer.model, mesh)
            losses.append([])
            for step in range(1, job.train.steps + 1):
                if "save" in one:
                    _save_weights(trainer.model, _weights_file(one["save"], step))
                if "load" in one:
                    _load_weights(trainer.model, _weights_file(one["load"], step))
                losses[-1].append(trainer.step(step, record).loss)
    return {"losses": losses, "dropout": dropout}


def _without_dropout(module: nn.Module) -> bool:
    """Turns dropout off, whose masks depend on how a batch and a model are split. Returns whether there was any."""
    found = False
    for child in module.modules():
        name = "p" if isinstance(child, _DropoutNd) else "dropout"  # attention and recurrent layers have `dropout`
        if isinstance(value := getattr(child, name, None), float) and value:
            setattr(child, name, 0.0)
            found = True
    return found


def refuse_random_numbers(module: nn.Module) -> None:
    """Makes a forward pass that draws random numbers raise CannotWork."""
    before: list[torch.Tensor] = []

    def check(*_: object) -> None:
        if not torch.equal(before.pop(), torch.get_rng_state()):
            what = "draws random numbers in its forward pass, which differ between layouts"
            raise CannotWork(Problem("model.module", what, "let model.arguments turn that off"))

    module.register_forward_pre_hook(lambda *_: before.append(torch.get_rng_state()))
    module.register_forward_hook(check)


def _reversed(read: BatchReader, size: int) -> BatchReader:
    """`read` with the `size` samples of a batch in reverse order: the same micro-batches, another order of sums."""

    def read_reversed(step: int, start: int, stop: int) -> dict[str, Any]:
        batch = read(step, size - stop, size - start)
        return {name: np.ascontiguousarray(values[::-1]) for name, values in batch.items()}

    return read_reversed


def _weights_file(folder: str, step: int) -> Path:
    return Path(folder) / f"step-{step}.safetensors"


def _save_weights(model: ParallelModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({row.name: model.local(name).detach().contiguous() for name, row in model.placements.items()}, path)


@torch.no_grad()
def _load_weights(model: ParallelModel, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name, row in model.placements.items():
            place = tuple(slice(s, s + n) for s, n in zip(row.box.start, row.box.shape, strict=True))
            if row.box.elements:
                model.local(name).copy_(file.get_tensor(row.name)[place])
