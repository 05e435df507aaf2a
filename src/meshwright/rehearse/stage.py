"""Training steps of one rank under a tracker: on real tensors with all ranks, or on fake tensors with this rank alone.

Both run the same code: `apply`, and whole steps of the Trainer with its task, optimizer and pipeline. Batches and
initial values are constants, because values do not change the memory.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright import tasks
from meshwright.job import Job
from meshwright.launch import Context
from meshwright.layout import Box, Execution, Layout
from meshwright.parallel import Mesh, apply, fake_mesh, start
from meshwright.rehearse import device
from meshwright.rehearse.peak import Peak, extrapolate
from meshwright.rehearse.tracker import TrackedSpans, Tracker, add_hooks
from meshwright.train.loop import Trainer
from meshwright.train.model import Model, model_of_job


@dataclass(frozen=True)
class TrackedRun:
    """A job with its layout, to run under a tracker, on devices of a `kind` (cpu, cuda)."""

    job: Job
    execution: Execution
    kind: str

    @property
    def layout(self) -> Layout:
        return self.execution.layout

    def with_micro_batches(self, count: int) -> TrackedRun:
        """The same run with `count` micro-batches per step."""
        train = self.job.train.model_copy(update={"global_batch": count * self.layout.dp * self.layout.micro_batch})
        return dataclasses.replace(self, job=self.job.model_copy(update={"train": train}))


def rehearsed_peak(run: TrackedRun, rank: int) -> Peak:
    """The peak of `rank`, in a world of any size, on fake tensors in this process; nothing is computed.

    A step of many micro-batches is extrapolated from shorter steps.
    """
    count = run.layout.micro_batches(run.job.train.global_batch)
    short = _steady_micro_batches(run)
    if count <= short + 1:
        return _largest(rehearsed_peaks(run, rank))
    if run.layout.pp == 1:  # only the batch grows
        return _with_batch(run, _largest(rehearsed_peaks(run.with_micro_batches(short), rank)), short, count)
    fewer, more = (rehearsed_peaks(run.with_micro_batches(some), rank) for some in (short, short + 1))
    return extrapolate(fewer, more, count - short - 1)


def _with_batch(run: TrackedRun, peak: Peak, fewer: int, more: int) -> Peak:
    """The peak of a step of `more` micro-batches, from that of `fewer`: only the batch is larger."""
    block = device.rounding(run.kind)
    data = ZeroBatches(run.job, model_of_job(run.job, None).module)

    def batch_bytes(count: int) -> int:
        with torch.device("meta"):
            share = data.batch(1, 0, count * run.layout.micro_batch)
        return sum(-(-tensor.nbytes // block) * block for tensor in share.values())

    extra = batch_bytes(more) - batch_bytes(fewer)
    parts = {**peak.parts, "activations": peak.parts["activations"] + extra}
    return dataclasses.replace(peak, total=peak.total + extra, parts=parts)


def _steady_micro_batches(run: TrackedRun) -> int:
    """The number of micro-batches from which each further one adds the same bytes to each moment.

    Without a pipeline the first allocates the gradients, the last reduces them, and one lies between. 1F1B must reach
    its steady state and, with gloo, whose sends keep their tensors, run through the whole of its end.
    """
    pp = run.layout.pp
    return max(3, 2 * pp - 1 if run.kind == "cpu" else pp + 1)


def measured_peaks(run: TrackedRun, context: Context, steps: int, *, name: str = "") -> list[Peak]:
    """The peak of each of `steps` real steps of this rank, in which all ranks of the layout take part."""
    tracker = Tracker(rounding=device.rounding(run.kind))
    with start(run.layout, context, name=name) as mesh:
        trainer = _trainer(run, mesh, lambda: tracker, fake=False)
        _track(tracker, trainer)
        peaks = []
        for step in range(1, steps + 1):
            tracker.forget()
            with tracker:
                trainer.step(step)
            peaks.append(tracker.peak())
    return peaks


def allocated_bytes(run: TrackedRun, context: Context, steps: int = 2, *, name: str = "") -> int:
    """The most bytes that the allocator has given out in a real run of `steps` steps, without a tracker: torch.cuda's
    figure on a GPU, on a CPU the highest sum of the profiler's allocations and frees in this thread."""
    gc.collect()  # garbage of an earlier run would be freed within this one
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with start(run.layout, context, name=name) as mesh:
            trainer = _trainer(run, mesh, nullcontext, fake=False)
            for step in range(1, steps + 1):
                trainer.step(step)
            if mesh.device.type == "cuda":
                return int(torch.cuda.max_memory_allocated(mesh.device))
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)


def _largest(peaks: Mapping[Any, Peak]) -> Peak:
    return max(peaks.values(), key=lambda peak: peak.total)


def rehearsed_peaks(run: TrackedRun, rank: int) -> dict[tuple[str, str], Peak]:
    """The peak of each moment (phase, block) of one rehearsed step of `rank`."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = Tracker(rounding=device.rounding(run.kind), workspace=device.workspace(run.kind), fake=True)

    @contextmanager
    def modes() -> Iterator[None]:
        with fake, tracker:
            yield

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch's warnings about fake tensors do not concern the user
        mesh = stack.enter_context(fake_mesh(run.layout, rank))
        stack.enter_context(device.buffered_sends(run.kind))
        trainer = _trainer(run, mesh, modes, fake=True)
        _track(tracker, trainer)
        tracker.forget()
        with modes():
            trainer.step(1)
        return tracker.peaks()


def _trainer(run: TrackedRun, mesh: Mesh, modes: Callable[[], Any], *, fake: bool) -> Trainer:
    """The Trainer of a rank. `modes` is entered where memory is allocated."""
    model = model_of_job(run.job, None)
    task = tasks.get(run.job.task.name)
    data = ZeroBatches(run.job, model.module)
    stage_shapes = _stage_shapes(run, mesh, model, task, data) if run.layout.pp > 1 and fake else None
    if fake:
        device.stand_in_kernels(model.module, run.kind)
    applied = apply(run.execution, model.card, model.module, mesh, allocating=modes())
    with modes():
        applied.fill(
            _constant, {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in applied.module.named_buffers()}
        )
        return Trainer(run.job, model.card, applied, mesh, task, data.batch, stage_shapes)


def _track(tracker: Tracker, trainer: Trainer) -> None:
    """Connects the tracker with the trainer's module, optimizer and spans."""
    add_hooks(tracker, trainer.model.module, trainer.mesh.last_stage)
    tracker.mark("optimizer", trainer.optimizer.state_tensors())
    trainer.spans = TrackedSpans(tracker)  # type: ignore[assignment]


def _constant(name: str, box: Box) -> Tensor:
    return torch.full(box.shape, 0.01)


class ZeroBatches:
    """Batches of zeros, in the shapes of the job."""

    def __init__(self, job: Job, module: nn.Module) -> None:
        self._length = job.data.seq_len or 1
        self._sample: Tensor | None = None
        if job.task.name != "language-model":
            sample_input: Any = module.sample_input
            sample = sample_input()
            self._sample = sample[0] if isinstance(sample, tuple) else sample

    def batch(self, step: int, begin: int, stop: int) -> dict[str, Tensor]:
        count = stop - begin
        if self._sample is None:
            names = ("input_ids", "positions", "targets")
            return {name: torch.zeros(count, self._length, dtype=torch.int64) for name in names}
        inputs = torch.zeros(count, *self._sample.shape[1:], dtype=self._sample.dtype)
        return {"inputs": inputs, "targets": torch.zeros(count, dtype=torch.int64)}


def _stage_shapes(
    run: TrackedRun, mesh: Mesh, model: Model, task: tasks.Task, data: ZeroBatches
) -> tuple[Tensor, Tensor]:
    """Input and output of this rank's stage on the meta device, from a forward pass of the whole module."""
    layout = run.layout
    blocks = dict(model.module.to("meta").blocks.named_children())  # type: ignore[union-attr]
    x, inputs = task.inputs(data.batch(1, 0, layout.micro_batch), "meta")
    ends = [x]
    for stage in run.execution.stages:
        with torch.no_grad():
            for name in stage:
                x = blocks[name](x, **inputs)
        ends.append(x)
    return _rank_part(run, ends[mesh.at.pp]), _rank_part(run, ends[mesh.at.pp + 1])


def _rank_part(run: TrackedRun, whole: Tensor) -> Tensor:
    """One rank's part of a tensor between stages, in the precision of the arithmetic."""
    if not whole.is_floating_point():
        return whole
    shape = list(whole.shape)
    if run.layout.sequence_parallel:
        shape[1] //= run.layout.tp
    dtype = torch.bfloat16 if run.execution.precision == "bf16" else whole.dtype
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
