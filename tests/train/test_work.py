"""A model that an update has destroyed ends its run by name, and is in no checkpoint; an evaluation ends when asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright import data, verbs
from meshwright.errors import RunFailed
from meshwright.job import Job
from meshwright.launch import Context
from meshwright.parallel import start
from meshwright.run import RunFolder
from meshwright.train.loop import BATCHES_UNTIL_ASKED
from meshwright.train.rank_files import RankFiles
from meshwright.train.work import Session

#: AdamW's first update moves each weight by the rate: weights of this size are finite, their products are not.
DESTROYS = 1e12


def job_of(folder: Path, *, steps: int, lr: float, devices: int = 1, **changes: dict[str, Any]) -> Job:
    source = folder / "corpus"
    if not source.exists():
        source.mkdir()
        for name in ("os", "json", "re"):
            shutil.copyfile(str(__import__(name).__file__), source / f"{name}.txt")
    train = {"steps": steps, "lr": lr, "global_batch": 8, "precision": "fp32", "compile": False, "decay": "constant"}
    return Job(
        model={"family": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": 300},
        data={"source": str(source), "seq_len": 32, "tokenizer": "bytes", "held_out": 0.2, **changes.get("data", {})},
        train={**train, "eval_batches": 2, **changes.get("train", {})},
        cluster={"devices": devices},
        layout={"micro_batch": 4, **changes.get("layout", {})},
        checkpoint={"every": 1},
    )


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def session(job: Job, run: RunFolder, *, resume: bool = False) -> dict[str, Any]:
    """Trains on one device in this process."""
    if not resume:
        data.build_manifest(job, run.create().manifest)
        run.logs.mkdir()
    plan = verbs.plan(job)
    with start(plan.chosen.layout, Context.alone()) as mesh:
        return Session(job, plan, RankFiles(run), mesh, resume=resume).train()


def checkpoints(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.glob("step-*"))


@pytest.mark.parametrize("held_out", [0.2, 0.0], ids=["measured", "nothing to measure"])
def test_a_last_update_that_destroys_the_model_fails_the_run(held_out: float, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    job = job_of(tmp_path, steps=1, lr=DESTROYS, data={"held_out": held_out})
    with pytest.raises(RunFailed, match=r"step 1: .*nan.*train\.lr \(1000000000000\.0\)"):
        session(job, run)
    assert checkpoints(run) == []
    assert not {"checkpoint", "end"} & {event["event"] for event in run.read_events()}


def test_the_newest_intact_checkpoint_stays_and_is_resumed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    session(job_of(tmp_path, steps=2, lr=1e-3), run)
    with pytest.raises(RunFailed, match="step 3: "):
        session(job_of(tmp_path, steps=4, lr=DESTROYS), run, resume=True)
    assert checkpoints(run) == ["step-1", "step-2"]
    assert session(job_of(tmp_path, steps=3, lr=1e-3), run, resume=True)["step"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_no_loss_shows_is_not_saved(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the embedding of a token that no text has; here no loss is measured at all."""
    update = torch.optim.AdamW.step

    def spoil(self: torch.optim.AdamW, *arguments: Any) -> Any:
        result = update(self, *arguments)
        embedding = next(value for group in self.param_groups for value in group["params"] if value.shape[0] == 300)
        embedding[200] = value
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr("meshwright.train.loop.Trainer._forward", lambda *_: None)
    job = job_of(tmp_path, steps=1, lr=1e-3, data={"held_out": 0.0})
    with pytest.raises(RunFailed, match=f"step 1: .*weights {value}"):
        session(job, run)
    assert checkpoints(run) == []


@pytest.mark.slow
def test_all_ranks_of_a_pipeline_agree(tmp_path: Path) -> None:
    """The first stage has no loss; its process must end with the other's error, and the command with exit code 4."""
    from meshwright.job import job_to_toml

    layout = {"pp": 2, "micro_batch": 4}
    job = job_of(tmp_path, steps=1, lr=DESTROYS, devices=2, layout=layout, data={"held_out": 0.0})
    (tmp_path / "job.toml").write_text(job_to_toml(job))
    words = ["train", str(tmp_path / "job.toml"), "--run", str(tmp_path / "run"), "--json"]
    command = [sys.executable, "-m", "meshwright", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 4, done.stderr
    assert "error: step 1: " in done.stderr and "resume with: " in done.stderr and "expected" not in done.stderr
    assert checkpoints(RunFolder(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("at_read", "last"), [(2, False), (2, True), (40, False)], ids=["early", "last step", "at its end"]
)
def test_a_signal_ends_an_evaluation_and_saves_the_step_that_was_reached(
    at_read: int, last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    held_out = data.Manifest.held_out

    def read(self: data.Manifest, start: int, count: int) -> data.Batch:
        nonlocal reads
        reads += 1
        if reads == at_read:
            os.kill(os.getpid(), signal.SIGTERM)
        return held_out(self, start, count)

    monkeypatch.setattr(data.Manifest, "held_out", read)
    run = RunFolder(tmp_path / "run")
    job = job_of(tmp_path, steps=1 if last else 4, lr=1e-3, train={"eval_every": 1, "eval_batches": 40})
    assert session(job, run)["step"] == 1
    assert at_read <= reads <= min(40, at_read + BATCHES_UNTIL_ASKED)
    assert checkpoints(run) == ["step-1"]
    kinds = [event["event"] for event in run.read_events()]
    assert kinds == ["start", "step", *(["eval"] if at_read == 40 else []), "checkpoint", "end"]
    assert run.read_events()[-1]["finished"] is last
    assert "held_out_loss" in session(job, run, resume=True)


def test_a_step_that_was_asked_to_be_the_last_is_saved_and_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = data.Manifest.batch

    def read(self: data.Manifest, *arguments: Any, **named: Any) -> data.Batch:
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, *arguments, **named)

    monkeypatch.setattr(data.Manifest, "batch", read)
    run = RunFolder(tmp_path / "run")
    assert session(job_of(tmp_path, steps=4, lr=1e-3, train={"eval_every": 1}), run)["step"] == 1
    assert [event["event"] for event in run.read_events()] == ["start", "step", "checkpoint", "end"]
