"""Buffers are state: saved, in `model/`, read back, and the same on every layout that may have them."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from meshwright import data, verbs
from meshwright.errors import CannotWork, InputError, RunFailed
from meshwright.job import Job
from meshwright.launch import Context
from meshwright.parallel import start
from meshwright.run import RunFolder
from meshwright.train.model import model_of_job
from meshwright.train.rank_files import RankFiles
from meshwright.train.work import Session
from tests.checkpoint.simulate import as_version_1, forge
from tests.train import normed_model

STEPS = 4


def job_of(steps: int, devices: int = 1, precision: str = "fp32", **layout: Any) -> Job:
    return Job(
        model={"module": "normed_model:build"},
        data={"source": "digits", "held_out": 0.2},
        train={
            "steps": steps,
            "lr": 1e-2,
            "global_batch": 16,
            "precision": precision,
            "decay": "constant",
            "eval_every": 1,
        },
        cluster={"devices": devices},
        layout=layout,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    pytest.importorskip("sklearn")
    shutil.copy(Path(__file__).with_name("normed_model.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "normed_model", raising=False)
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield tmp_path
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


def train(run: RunFolder, steps: int, *, resume: bool = False, precision: str = "fp32") -> dict[str, Tensor]:
    """Trains on one device in this process up to `steps`; what its last checkpoint holds."""
    job = job_of(steps, precision=precision)
    if not resume:
        data.build_manifest(job, run.create().manifest)
        run.logs.mkdir()
    plan = verbs.plan(job)
    with start(plan.chosen.layout, Context.alone()) as mesh:
        Session(job, plan, RankFiles(run), mesh, resume=resume).train()
    return saved(run, steps)


def saved(run: RunFolder, step: int) -> dict[str, Tensor]:
    folder = run.checkpoints / f"step-{step}"
    tensors: dict[str, Tensor] = {}
    for path in [folder / "model" / "model.safetensors", *sorted((folder / "state").iterdir())]:
        tensors |= load_file(path)
    return tensors


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_resumed_run_is_the_continued_one(folder: Path) -> None:
    whole = train(RunFolder(folder / "whole"), STEPS)
    halves = RunFolder(folder / "halves")
    train(halves, STEPS // 2)
    assert_equal(train(halves, STEPS, resume=True), whole)
    assert whole["blocks.body.seen"].item() == whole["blocks.head.norm.num_batches_tracked"].item() == STEPS
    assert whole["blocks.body.norm.num_batches_tracked"].dtype == torch.int64


def replace_in_model(folder: Path, old: str, new: str) -> None:
    source = (folder / "normed_model.py").read_text()
    assert old in source
    (folder / "normed_model.py").write_text(source.replace(old, new))


def test_a_buffer_that_bf16_makes_another_type_is_resumed_as_it_went_on(folder: Path) -> None:
    """The next step uses what the last one left, so a run that went on in bf16 would part from one that was resumed."""
    replace_in_model(folder, "nn.BatchNorm2d(width)", "nn.Identity()")
    replace_in_model(folder, "torch.zeros((), dtype=torch.int32)", "torch.zeros(width)")
    replace_in_model(
        folder,
        "self.seen = self.seen + 1",
        "self.seen = (self.inner(x[:, None]).mean((0, 2, 3)) + self.seen.to(self.inner.weight.dtype) / 3).detach()",
    )
    whole = train(RunFolder(folder / "whole"), STEPS, precision="bf16")
    halves = RunFolder(folder / "halves")
    assert train(halves, STEPS // 2, precision="bf16")["blocks.body.seen"].dtype == torch.float32
    assert_equal(train(halves, STEPS, resume=True, precision="bf16"), whole)


def test_a_buffer_of_another_shape_ends_the_run_by_its_name(folder: Path) -> None:
    """The trace passes one sample, and cannot see what more of them do."""
    replace_in_model(folder, "torch.zeros((), dtype=torch.int32)", "torch.zeros(1)")
    replace_in_model(folder, "self.seen = self.seen + 1", "self.seen = x.detach().mean((1, 2))")
    with pytest.raises(RunFailed, match=r"step 1: the buffer 'blocks\.body\.seen' has shape \[16\], .* shape \[1\]"):
        train(RunFolder(folder / "run"), 1)


def without_buffers(record: dict[str, Any]) -> None:
    """As checkpoints were before buffers were saved."""
    as_version_1(record)
    for name in list(record["tensors"]):
        if name.endswith(("seen", "running_mean", "running_var", "num_batches_tracked")):
            del record["tensors"][name]


def test_a_checkpoint_older_than_saved_buffers_goes_on_where_training_changes_none(folder: Path) -> None:
    replace_in_model(folder, "nn.BatchNorm2d(width)", "nn.Identity()")
    replace_in_model(folder, "self.seen = self.seen + 1", "x = x + self.seen")
    replace_in_model(folder, "torch.zeros((), dtype=torch.int32)", "torch.ones(8)")
    whole = train(RunFolder(folder / "whole"), STEPS)
    halves = RunFolder(folder / "halves")
    train(halves, STEPS // 2)
    forge(halves.checkpoints / f"step-{STEPS // 2}", without_buffers)
    assert_equal(train(halves, STEPS, resume=True), whole)


def test_a_checkpoint_older_than_saved_buffers_is_refused_where_they_are_lost(folder: Path) -> None:
    run = RunFolder(folder / "run")
    train(run, 1)
    forge(run.checkpoints / "step-1", without_buffers)
    with pytest.raises(InputError, match=r"step-1: is older than saved buffers: .* blocks\.body\.norm\.running_mean, "):
        train(run, 2, resume=True)


def test_what_is_saved_is_the_state_dict(folder: Path) -> None:
    run = RunFolder(folder / "run")
    train(run, 1)
    model = normed_model.build()
    model.load_state_dict(load_file(run.checkpoints / "step-1" / "model" / "model.safetensors"), strict=True)
    assert model.state_dict()["blocks.body.norm.running_var"].ne(1).all()
    assert "blocks.body.scale" not in model.state_dict()


@pytest.mark.slow
def test_stages_of_a_pipeline_own_what_one_device_has(folder: Path) -> None:
    """Evaluation between the steps makes torch learn the shapes anew, by passes of invented values."""
    alone = train(RunFolder(folder / "alone"), 3)
    verbs.train(job_of(3, devices=2, pp=2, schedule="gpipe", micro_batch=16), run=folder / "pipeline")
    split = saved(RunFolder(folder / "pipeline"), 3)
    counts = {name for name in alone if name.endswith(("seen", "num_batches_tracked"))}
    assert alone.keys() == split.keys() and len(counts) == 3
    for name, tensor in alone.items():
        torch.testing.assert_close(split[name], tensor, rtol=0 if name in counts else 1e-5, atol=1e-7)


def test_a_type_that_cannot_be_saved_is_refused_before_training(folder: Path) -> None:
    source = (folder / "normed_model.py").read_text()
    (folder / "normed_model.py").write_text(source.replace("torch.zeros((), dtype=torch.int32)", "torch.zeros(1) * 1j"))
    with pytest.raises(InputError, match=r"blocks\.body\.seen is torch\.complex64"):
        model_of_job(job_of(1), None)


def test_buffers_are_refused_where_a_layout_would_change_them(folder: Path) -> None:
    with pytest.raises(CannotWork, match="differ between parts of a batch"):
        verbs.verify(job_of(1, devices=2, dp=2))
    with pytest.raises(CannotWork, match=r"would change buffers .* twice"):
        verbs.verify(job_of(1, recompute="full"))
