"""What every process of a training run does, from the run folder to the last checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright import checkpoint, data, tasks
from meshwright.errors import InputError, Problem
from meshwright.job import Job, load_job
from meshwright.launch import Context
from meshwright.parallel import Mesh, apply, start
from meshwright.placement import Placement
from meshwright.plan import Plan
from meshwright.run import RunFolder
from meshwright.train.loop import Clock, Record, StepResult, Trainer
from meshwright.train.model import Model, model_of_job
from meshwright.train.recorder import recorder
from meshwright.train.spans import merge


def work(payload: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains the run in folder `payload["run"]`, whose manifest is there, to its last step; rank 0 writes the events.

    `payload["resume"]`: go on from the newest committed checkpoint. `payload["record"]`: a folder where every step's
    gradients are written, for `verify`. Returns {"step", "loss", ...} of the end.
    """
    run = RunFolder(payload["run"])
    job = load_job(run.job, data_must_exist=False)
    plan = Plan.read(run.plan)
    layout = plan.chosen.layout
    torch.set_flush_denormal(True)
    with start(layout, context.rank, context.store_path, timeout_seconds=job.launch.timeout_seconds) as mesh:
        session = Session(job, plan, run, mesh, resume=bool(payload.get("resume")))
        session.record = recorder(payload.get("record"), session.trainer.applied, mesh)
        return session.train()


class Session:
    """A run in one process: the trainer with its data, events and checkpoints."""

    def __init__(self, job: Job, plan: Plan, run: RunFolder, mesh: Mesh, *, resume: bool) -> None:
        self.job, self.plan, self.run, self.mesh = job, plan, run, mesh
        self.record: Record | None = None
        self.manifest = data.Manifest.open(run.manifest)
        self.task = tasks.get(job.task.name)
        self.model: Model = model_of_job(job, self.manifest.content.get("eos"))
        chosen = plan.chosen
        applied = apply(chosen, self.model.card, self.model.module, mesh)
        self.model.fill(applied)
        view = DataView(self.manifest, job)
        self.trainer = Trainer(job, self.model.card, applied, mesh, self.task, view)
        self.done = self._restore() if resume else 0
        asked, outlook = job.checkpoint.every, plan.outlook
        self.checkpoint_steps = asked if asked is not None else (outlook.checkpoint_steps if outlook else 0)
        self.writer = checkpoint.Writer(
            run.checkpoints,
            mesh.rank,
            chosen.layout.devices,
            asynchronous=job.checkpoint.asynchronous,
            keep=job.checkpoint.keep,
            layout=chosen.layout,
            parent=self.done or None,
        )

    def train(self) -> dict[str, Any]:
        """Steps until the job's last one, or until asked to stop (SIGTERM, SIGINT), which saves first."""
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._ask_stop)
        self._event("start", step=self.done, layout=self.plan.chosen.layout.as_dict(), steps=self.job.train.steps)
        clock = Clock(self.mesh.device)
        held_out: dict[str, float] = {}
        result, saved = None, self.done if self.done else None
        for step in range(self.done + 1, self.job.train.steps + 1):
            result = self.trainer.step(step, self.record)
            seconds = clock.tick()
            self._say_step(step, result, seconds)
            last = step == self.job.train.steps or result.stop_asked
            if self._due(self.job.train.eval_every, step) or step == self.job.train.steps:
                with self.trainer.spans("evaluate", step):
                    held_out = self.trainer.evaluate()
                self._event("eval", step=step, **held_out)
            if self._due(self.checkpoint_steps, step) or last:
                with self.trainer.spans("checkpoint", step):
                    self._save(step)
                saved = step
            clock.tick()
            if result.stop_asked:
                break
        self.writer.wait()
        self.trainer.spans.write(self.run, self.mesh.rank)
        dist.barrier()
        if self.mesh.rank == 0:
            merge(self.run, self.mesh.layout.devices)
        step = saved or 0
        self._event("end", step=step, finished=step == self.job.train.steps, **held_out)
        return {"step": step, "loss": result.loss if result else None, **held_out}

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and step % every == 0

    def _say_step(self, step: int, result: StepResult, seconds: float) -> None:
        predicted = self.plan.chosen.predicted.step_seconds.mid
        self._event(
            "step",
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.rate,
            tokens_per_second=result.counted / seconds,
            step_seconds=seconds,
            predicted_step_seconds=predicted,
            peak_bytes=result.peak_bytes,
        )

    def _event(self, kind: str, **fields: Any) -> None:
        if self.mesh.rank == 0:
            self.run.append_event(kind, **fields)

    def _ask_stop(self, *_: Any) -> None:
        self.trainer.stop_asked = True

    def _save(self, step: int) -> None:
        clock = Clock(self.mesh.device)
        meta = {"seed": self.job.train.seed, "job": self.job.as_dict()}
        folder = self.model.folder(self.manifest.side_files())
        self.writer.save(step, self._weights(), self.trainer.optimizer.state(), meta, folder)
        self._event("checkpoint", step=step, seconds=clock.tick())

    def _weights(self) -> dict[str, tuple[Placement, Tensor]]:
        applied = self.trainer.applied
        return {row.name: (row, applied.local(name).detach()) for name, row in applied.placements.items()}

    def _restore(self) -> int:
        """Loads the newest committed checkpoint; returns its step, 0 where there is none."""
        folder = checkpoint.latest(self.run.checkpoints)
        if folder is None:
            return 0
        manifest = checkpoint.read_manifest(folder)
        if manifest.step > self.job.train.steps:
            what = f"holds step {manifest.step}, the job ends at {self.job.train.steps}"
            raise InputError(Problem(str(folder), what, f"nearest: train.steps={manifest.step}"))
        checkpoint.load(folder, {**self._weights(), **self.trainer.optimizer.state()})
        self.trainer.optimizer.set_step(manifest.step)
        self._event("recovery", step=manifest.step, checkpoint=folder.name)
        return int(manifest.step)


class DataView:
    """The manifest as the trainer asks for it: shares of a training or a held-out batch. Steps count from 1."""

    def __init__(self, manifest: data.Manifest, job: Job) -> None:
        self._manifest, self._train = manifest, job.train
        self.held_out_samples = manifest.held_out_samples
        self.held_out_bytes = manifest.held_out_bytes

    def batch(self, step: int, start: int, stop: int) -> data.Batch:
        return self._manifest.batch(self._train.seed, step - 1, self._train.global_batch, start, stop)

    def held_out(self, index: int, start: int, stop: int) -> data.Batch:
        return self._manifest.held_out(index * self._train.global_batch + start, stop - start)
