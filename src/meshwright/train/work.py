"""What every process of a training run does, from the run folder to the last checkpoint."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright import checkpoint, data, tasks
from meshwright.errors import InputError, MeshwrightError, Problem, RunFailed
from meshwright.job import Job, load_job
from meshwright.launch import Context
from meshwright.parallel import Mesh, apply, start
from meshwright.placement import Placement
from meshwright.plan import Plan
from meshwright.run import RunFolder
from meshwright.train.loop import Clock, Evaluation, StepResult, Trainer
from meshwright.train.model import Model, model_of_job
from meshwright.train.optimizer import moment_names
from meshwright.train.rank_files import RankFiles, files_of
from meshwright.train.same_model import refuse_other_model, source_changed, unsaved_buffers


def work(payload: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Trains the run in folder `payload["run"]`, whose manifest exists, to its last step; rank 0 tells the events, and
    at the end each rank its part of the trace.

    `payload["resume"]`: continue from the newest committed checkpoint. Returns {"step", "loss", ...} of the last step.
    """
    run = RunFolder(payload["run"])
    files = files_of(context, run)
    with files.located():
        job = load_job(files.run.job, data_must_exist=False)
    plan = Plan.read(files.run.plan)
    layout = plan.chosen.layout
    torch.set_flush_denormal(True)

    def event(kind: str, **fields: Any) -> None:
        context.tell("event", {"kind": kind, **fields})

    with start(layout, context, timeout_seconds=job.launch.timeout_seconds) as mesh:
        resume, lease = bool(payload.get("resume")), run.lease(context.generation)
        with files.located():
            session = Session(job, plan, files, mesh, resume=resume, lease=lease, event=event)
        result = session.train()
    context.tell("trace", blob=json.dumps(session.trainer.spans.events(context.rank)).encode())
    return result


class Session:
    """A run in one process: the trainer with its data, events and checkpoints."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        files: RankFiles,
        mesh: Mesh,
        *,
        resume: bool,
        lease: Path | None = None,
        event: Callable[..., None] | None = None,
    ) -> None:
        """lease: the folder that this generation of ranks prepares its checkpoints in; event(kind, **fields): takes
        the run's events (default: the run's own log)."""
        self.job, self.plan, self.files, self.mesh = job, plan, files, mesh
        self._write_event = event or files.run.append_event
        self.manifest = data.Manifest.open(files.run.manifest)
        self.model: Model = model_of_job(job, self.manifest.content.get("eos"))
        chosen = plan.chosen
        parallel_model = apply(chosen, self.model.card, self.model.module, mesh)
        self.model.fill(parallel_model)
        self.trainer = Trainer(job, self.model.card, parallel_model, mesh, tasks.get(job.task.name), self._batch)
        self._shift = 0  # samples consumed, less those of as many steps of this batch size
        self.first_step = 1 + (self._restore() if resume else 0)
        every, planned = job.checkpoint.every, plan.outlook.checkpoint_steps if plan.outlook else 0
        self.checkpoint_steps = planned if every is None else every
        self.writer = checkpoint.Writer(
            files.checkpoints,
            mesh.rank,
            chosen.layout.devices,
            asynchronous=job.checkpoint.asynchronous,
            keep=job.checkpoint.keep,
            layout=chosen.layout,
            parent=self.first_step - 1 or None,
            lease=lease,
            disk=files.disk,
            committed=lambda step, seconds: self._event("checkpoint", step=step, seconds=seconds),
        )

    def train(self) -> dict[str, Any]:
        """Steps to the job's last one, or until SIGTERM, SIGINT or SIGHUP; both end with a checkpoint."""
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if kind != signal.SIGHUP or signal.getsignal(kind) != signal.SIG_IGN:  # nohup has it ignored
                signal.signal(kind, self._request_stop)
        done = self.first_step - 1
        self._event("start", step=done, layout=self.plan.chosen.layout.as_dict(), steps=self.job.train.steps)
        try:
            step, loss, held_out = self._steps(done)
        except RunFailed:
            with contextlib.suppress(MeshwrightError):  # the step's error is the one to tell
                self.writer.wait()
            raise
        self.writer.wait()
        self._event("end", step=step, finished=step == self.job.train.steps, **held_out)
        return {"step": step, "loss": loss, **held_out}

    def _steps(self, done: int) -> tuple[int, float | None, Mapping[str, float]]:
        """Makes the steps after `done`; returns the last, its loss (None where there was none) and the last evaluation.
        A checkpoint is saved after the evaluation of its step, which may find that the model is destroyed."""
        clock = Clock()
        loss: float | None = None
        held_out: Mapping[str, float] = {}
        if done == self.job.train.steps:  # as after a run that was asked to end during its last evaluation
            held_out = self._evaluate(done).metrics
        for step in range(done + 1, self.job.train.steps + 1):
            result = self.trainer.step(step)
            seconds = clock.tick()
            self._append_step_event(step, result, seconds)
            done, loss, last = step, result.loss, step == self.job.train.steps
            stop = result.stop_requested  # then it saves at once: whoever asked may not wait for long
            if not stop and (self._is_due(self.job.train.eval_every, step) or last):
                evaluation = self._evaluate(step)
                held_out, stop = evaluation.metrics, evaluation.stop_requested
            if self._is_due(self.checkpoint_steps, step) or last or stop:
                with self.trainer.spans("checkpoint", step):
                    self.trainer.require_finite(step)
                    self._save(step)
            if stop:
                break
            clock.tick()
        return done, loss, held_out

    def _evaluate(self, step: int) -> Evaluation:
        with self.trainer.spans("evaluate", step):
            evaluation = self.trainer.evaluate(self.manifest, step)
        if evaluation.metrics:
            self._event("eval", step=step, **evaluation.metrics)
        return evaluation

    def _is_due(self, every: int, step: int) -> bool:
        return bool(every) and step % every == 0

    def _append_step_event(self, step: int, result: StepResult, seconds: float) -> None:
        self._event(
            "step",
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.rate,
            tokens_per_second=result.counted / seconds,
            step_seconds=seconds,
            predicted_step_seconds=self.plan.chosen.predicted.step_seconds.mid,
            peak_bytes=result.peak_bytes,
        )

    def _event(self, kind: str, **fields: Any) -> None:
        if self.mesh.rank == 0:
            self._write_event(kind, **fields)

    def _request_stop(self, *_: Any) -> None:
        self.trainer.stop_requested = True

    def _save(self, step: int) -> None:
        samples = step * self.job.train.global_batch + self._shift
        meta = {"seed": self.job.train.seed, "samples": samples, "job": self.job.as_dict()}
        folder = self.model.folder(self.manifest.side_files())
        self.writer.save(step, self._weights(), self.trainer.optimizer.state(), meta, folder)

    def _weights(self) -> dict[str, tuple[Placement, Tensor]]:
        model = self.trainer.model
        return {row.name: (row, model.local(name).detach()) for name, row in model.placements.items()}

    def _restore(self) -> int:
        """Loads the newest committed checkpoint; returns its step, 0 if there is none. An event says so."""
        folder = self.files.newest_checkpoint()
        if folder is None:
            self._event("recovery", step=0, checkpoint="none was committed: from the start")
            return 0
        manifest = checkpoint.read_manifest(folder)
        if manifest.step > self.job.train.steps:
            what = f"holds step {manifest.step}, the job ends at {self.job.train.steps}"
            raise InputError(Problem(str(folder), what, f"nearest: train.steps={manifest.step}"))
        hf = self.job.model.hf
        refuse_other_model(self.model, str(Path(hf) / "config.json") if hf else str(self.files.run.job), folder)
        parameters = [parameter.name for parameter in self.model.card.parameters]
        complete = {*self.model.names, *moment_names(parameters)}
        unsaved = unsaved_buffers(self.model, manifest, folder)
        weights = {name: entry for name, entry in self._weights().items() if name not in unsaved}
        checkpoint.load(folder, {**weights, **self.trainer.optimizer.state()}, complete=complete)
        self.trainer.optimizer.set_step(manifest.step)
        before, now = manifest.meta["job"]["train"], self.job.as_dict()["train"]
        samples = manifest.meta.get("samples", manifest.step * before["global_batch"])
        self._shift = samples - manifest.step * self.job.train.global_batch
        changed = {
            f"train.{key}": f"{was} -> {value}" for key, value in now.items() if (was := before.get(key)) != value
        }
        if source_changed(self.model, folder):
            changed["model.module"] = f"the source of {self.job.model.module} was changed"
        self._event("recovery", step=manifest.step, checkpoint=folder.name, samples=samples, **changed)
        return int(manifest.step)

    def _batch(self, step: int, start: int, stop: int) -> data.Batch:
        train = self.job.train
        return self.manifest.batch(train.seed, step - 1, train.global_batch, start, stop, shift=self._shift)
