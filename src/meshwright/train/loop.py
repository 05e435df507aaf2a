"""The training loop. Every step: batch, forward and backward, complete the gradients, clip, update."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meshwright.card import Card
from meshwright.data import Manifest
from meshwright.errors import Problem, RunFailed
from meshwright.layout import Layout
from meshwright.nn import GPU_TYPES, to_device
from meshwright.parallel import Mesh, ParallelModel, Pipeline
from meshwright.tasks import Task, Totals
from meshwright.train.buffers import BufferTypes
from meshwright.train.optimizer import Optimizer, complete_gradients, learning_rate
from meshwright.train.spans import Spans

if TYPE_CHECKING:
    from meshwright.job import Job

#: (step, start, stop) -> samples start..stop of the global batch of that step.
BatchReader = Callable[[int, int, int], Mapping[str, Any]]
#: Called with (step, {name: gradient}, factor to the true gradient) before the gradients are clipped.
Record = Callable[[int, Mapping[str, Tensor], float], None]


#: An evaluation asks after so many batches whether to stop: going forward they take about as long as one step, which a
#: stop request waits for too.
BATCHES_UNTIL_ASKED = 3


@dataclass(frozen=True)
class StepResult:
    """What all ranks agree on after a step. `loss` is per counted unit (nats); `peak_bytes` is the worst rank's."""

    loss: float
    grad_norm: float
    rate: float
    counted: int
    peak_bytes: int
    stop_requested: bool


@dataclass(frozen=True)
class Evaluation:
    """What all ranks agree on after an evaluation. `metrics` is {} where nothing is held out, or where a stop request
    cut the evaluation short."""

    metrics: Mapping[str, float]
    stop_requested: bool


class Trainer:
    """One rank's loop over its part of a model.

    `batch(step, start, stop)` returns samples start..stop of the global batch of `step` (from 1); `task` turns them
    into inputs, targets and a summed loss. `boundary` is the Pipeline's.
    """

    def __init__(
        self,
        job: Job,
        card: Card,
        model: ParallelModel,
        mesh: Mesh,
        task: Task,
        batch: BatchReader,
        boundary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.job, self.card, self.model, self.mesh, self.task, self.batch = job, card, model, mesh, task, batch
        self.layout: Layout = mesh.layout
        self.optimizer = Optimizer(model, job.train, mesh.device)
        self.buffer_types = BufferTypes(model)
        self.micro_batches = self.layout.micro_batches(job.train.global_batch)
        self.stop_requested = False
        self.spans = Spans()
        # Gradients are averaged over the data-parallel ranks, so each is scaled up by their number. Dividing by all
        # units keeps magnitudes near one; `step` then corrects exactly for targets that do not count (padding).
        self._units = job.train.global_batch * card.units_per_sample
        self._scale = self.layout.dp * self.layout.cp / self._units
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._counted = 0
        self._extras: dict[str, Tensor] | None = None  # sums for metrics, while measuring
        self._pipeline: Pipeline | None = None
        if self.layout.pp > 1:
            self._pipeline = Pipeline(model, mesh, self.micro_batches, self._loss, boundary)

    def step(self, step: int, record: Record | None = None) -> StepResult:
        """Optimizer update number `step` (from 1). Raises RunFailed when loss or gradient is not finite."""
        self._reset()
        torch.manual_seed(self._noise_seed(step))
        self.model.module.train()
        with self.spans("batch", step):
            batch = self.batch(step, *self._share())
        with self.spans("forward and backward", step):
            self._forward_backward(batch, step)
        self.buffer_types.keep(step)
        with self.spans("complete gradients", step):
            self.optimizer.collect()
            complete_gradients(self.model, self.optimizer, self.mesh)
        with self.spans("agree", step):
            loss_sum, counted, squared, peak_bytes, stop_requested = self._agree()
        if not counted:
            raise RunFailed(Problem(f"step {step}", "every target of the batch is ignored", "see meshwright check"))
        correction = self._units / counted
        norm = correction * math.sqrt(squared)
        loss = loss_sum / counted
        self._refuse_not_finite(step, {"loss": loss, "gradient norm": norm})
        if record:
            record(step, self.optimizer.named_gradients(), correction)
        rate = learning_rate(step, self.job.train)
        with self.spans("optimizer", step):
            self._clip(norm, correction)
            self.optimizer.step(rate)
            self.optimizer.clear()
        return StepResult(loss, norm, rate, round(counted), round(peak_bytes), stop_requested)

    @torch.no_grad()
    def evaluate(self, manifest: Manifest, step: int) -> Evaluation:
        """Loss per unit of at most `train.eval_batches` held-out batches after update `step`, with the task's metrics.
        A stop request ends it soon. Raises RunFailed when a metric is not finite."""
        self._reset()
        self._extras = {name: torch.zeros_like(self._loss_sum) for name in self.task.extra_names}
        self.model.module.eval()
        text_bytes = 0
        size, (start, stop) = self.job.train.global_batch, self._share()
        for index in range(min(self.job.train.eval_batches, -(-manifest.held_out_samples // size))):
            if index and index % BATCHES_UNTIL_ASKED == 0 and self._any_asked_to_stop():
                self._extras = None
                return Evaluation({}, stop_requested=True)
            text_bytes += manifest.held_out_bytes(index * size, size)
            self._forward(manifest.held_out(index * size + start, stop - start))
        extras, self._extras = self._extras, None
        evaluation = self._evaluation(text_bytes, extras)
        self._refuse_not_finite(step, {name.replace("_", " "): value for name, value in evaluation.metrics.items()})
        return evaluation

    @torch.no_grad()
    def require_finite(self, step: int) -> None:
        """Raises RunFailed, on every rank, where update `step` has destroyed the model: a value of it is not finite, or
        its loss on a micro-batch of that step (in a pipeline, on all of them), which large values make infinite.

        The forward pass is not compiled: compiling it for this may take longer than a run that is asked to end has.
        """
        self._reset()
        self.model.module.eval()
        start, stop = self._share()
        with torch.compiler.set_stance("force_eager"):
            self._forward(self.batch(step, start, stop if self._pipeline else start + self.layout.micro_batch))
        loss_sum, largest = self._sums([self._share_of(self._loss_sum), self._largest()], [])
        self._refuse_not_finite(step, {"loss after the update": loss_sum, "sum of the largest weights": largest})

    def _largest(self) -> Tensor:
        """The largest magnitude of this rank's weights and buffers, an fp64 scalar; NaN where one of them is NaN."""
        local = (self.model.local(name).detach() for name in self.model.placements)
        values = [value for value in local if value.is_floating_point() and value.numel()]
        if not values:
            return torch.zeros_like(self._loss_sum)
        return torch.stack([norm.double() for norm in torch._foreach_norm(values, ord=math.inf)]).max()

    def _refuse_not_finite(self, step: int, figures: Mapping[str, float]) -> None:
        if not all(math.isfinite(value) for value in figures.values()):
            what = ", ".join(f"{name} {value}" for name, value in figures.items())
            raise RunFailed(Problem(f"step {step}", what, f"lower train.lr ({self.job.train.lr}) or check the data"))

    def _evaluation(self, text_bytes: int, extras: Mapping[str, Tensor]) -> Evaluation:
        mine = [self._share_of(value) for value in (self._loss_sum, *extras.values())]
        loss_sum, *totals, counted, stop = self._sums(mine, [self._counted * self._contributes, self.stop_requested])
        metrics: dict[str, float] = {}
        if counted:
            sizes = Totals(round(counted), text_bytes, dict(zip(extras, totals, strict=True)))
            metrics = {"held_out_loss": loss_sum / counted, **self.task.metrics(loss_sum / counted, sizes)}
        return Evaluation(metrics, stop > 0)

    def _any_asked_to_stop(self) -> bool:
        """Whether a stop was requested of any rank: equal on all of them. It waits for the device."""
        return self._sums([torch.zeros_like(self._loss_sum)], [self.stop_requested])[1] > 0

    def _forward(self, batch: Mapping[str, Any]) -> None:
        """Adds the loss of a batch, or of the first micro-batches of one, to the sums."""
        self._counted += self.task.count(batch)
        x, inputs, targets = self._tensors(batch)
        if self._pipeline:
            self._add_losses(self._pipeline.evaluate(x, inputs, targets))
            return
        for part in self._split_micro_batches(x, inputs, targets):
            self._add_losses([self._loss(self.model.module(part[0], **part[1]), part[2])])

    def _share(self) -> tuple[int, int]:
        """Start and stop, in a global batch, of this data-parallel rank's samples."""
        size = self.job.train.global_batch // self.layout.dp
        start = self.mesh.at.dp(self.layout) * size
        return start, start + size

    def _tensors(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        x, inputs = self.task.inputs(batch, self.mesh.device)
        return x, inputs, self.task.targets(batch, self.mesh.device)

    def _split_micro_batches(self, x: Tensor, inputs: Mapping[str, Tensor], targets: Tensor) -> list[Any]:
        size = self.layout.micro_batch
        return [
            (x[i : i + size], {name: value[i : i + size] for name, value in inputs.items()}, targets[i : i + size])
            for i in range(0, x.shape[0], size)
        ]

    def _forward_backward(self, batch: Mapping[str, Any], step: int) -> None:
        self._counted = self.task.count(batch)
        x, inputs, targets = self._tensors(batch)
        if self._pipeline:
            self._add_losses(self._pipeline.step(x, inputs, targets))
            return
        parts = self._split_micro_batches(x, inputs, targets)
        for index, (x, inputs, targets) in enumerate(parts):
            self.model.sync_gradients(index == len(parts) - 1)
            with self.spans("forward", step):
                loss = self._loss(self.model.module(x, **inputs), targets)
            with self.spans("backward", step):
                loss.backward()
            self._add_losses([loss])

    def _loss(self, output: Tensor, targets: Tensor) -> Tensor:
        if self._extras is not None:
            for name, value in self.task.extras(output, targets).items():
                self._extras[name] += value
        loss: Tensor = self.task.loss_sum(output, targets, self.model.output)
        return loss * self._scale

    def _add_losses(self, losses: list[Tensor]) -> None:
        for loss in losses:
            self._loss_sum += loss.detach() / self._scale

    def _reset(self) -> None:
        self._loss_sum.zero_()
        self._counted = 0

    @property
    def _contributes(self) -> bool:
        """Whether this rank adds to the world's sums: it is on the last stage, and the first of tensor-parallel ranks,
        which all have the same values."""
        return self.mesh.last_stage and self.mesh.at.tp == 0

    def _share_of(self, value: Tensor) -> Tensor:
        """What this rank adds to the world's sum of a scalar."""
        return value if self._contributes else torch.zeros_like(value)

    def _agree(self) -> tuple[float, float, float, float, bool]:
        """One collective for all that the ranks must agree on; each rank's peak memory has its own slot."""
        peaks = [0.0] * self.layout.devices
        peaks[self.mesh.rank] = peak_bytes(self.mesh.device)
        mine = [self._share_of(self._loss_sum), self.optimizer.squared_norm()]
        sums = self._sums(mine, [self._counted * self._contributes, self.stop_requested, *peaks])
        loss_sum, squared, counted, stop, *peaks = sums
        return loss_sum, counted, squared, max(peaks), stop > 0

    def _sums(self, on_device: Sequence[Tensor], on_host: Sequence[float]) -> list[float]:
        """The sums over all ranks of fp64 scalars on the device, then of numbers of the host.

        Reading them is where the host waits for the device, the only place in a step: all else is queued.
        """
        host = to_device(torch.tensor(on_host, dtype=torch.float64), self.mesh.device)
        sums: list[float] = self.mesh.sum_over_world(torch.cat((torch.stack(list(on_device)), host))).tolist()
        return sums

    def _clip(self, norm: float, correction: float) -> None:
        """Scales the gradients to norm `train.clip` at most, with torch.nn.utils.clip_grad_norm_'s formula."""
        limit = self.job.train.clip
        factor = correction * min(1.0, limit / (norm + 1e-6)) if limit else correction
        if factor != 1.0 and self.optimizer.parameters:
            torch._foreach_mul_(self.optimizer.gradients(), factor)

    def _noise_seed(self, step: int) -> int:
        """Seed of a model's own randomness (dropout), by step and data-parallel rank: a resumed run draws what the
        uninterrupted one would."""
        seed = (self.job.train.seed * 1_000_003 + step) * 65_537 + self.mesh.at.dp(self.layout)
        return int(seed % 2**63)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: allocated on the GPU, or resident on the host."""
    if device.type in GPU_TYPES:
        return int(torch.accelerator.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds since the last tick. On a GPU a step's end is when its loss has been read: its update, which is queued by
    then, runs while the host prepares the next step, and counts there."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def tick(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
