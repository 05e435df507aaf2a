"""Whole runs through the command whose data and checkpoints are in a real S3 server."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright import checkpoint, verbs
from meshwright.run import RunFolder
from meshwright.storage import RunCopy
from tests.stores import SECRET, S3Server, s3_server
from tests.train.test_runs import command, eventually, kill_everything, last, losses, new_job

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with s3_server() as one:
        one.lead_here(monkeypatch, one.port)
        yield one


def uploads(run: Path) -> list[dict[str, Any]]:
    return [event for event in RunFolder(run).read_events() if event["event"] == "upload"]


def test_a_run_goes_on_from_the_store_on_a_fresh_machine(server: S3Server, tmp_path: Path) -> None:
    job = new_job(tmp_path / "job")
    server.files().put(str(tmp_path / "job" / "corpus"), "bucket/corpus", recursive=True)
    whole = tmp_path / "whole"
    verbs.train(job, run=whole)
    shutil.rmtree(tmp_path / "job" / "corpus")
    words = ("data.source=s3://bucket/corpus", "checkpoint.url=s3://bucket/runs/job")
    first, second = tmp_path / "first", tmp_path / "second"
    with command(job, first, *words, "--resume") as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "s3://bucket/runs/job: holds no committed checkpoint" in err
    with command(job, first, *words) as process:
        eventually(lambda: any("error" not in event for event in uploads(first)), process)
        kill_everything(process.pid)
    shutil.rmtree(first)  # the machine is gone with all that it had
    with command(job, second, *words) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "holds a run already" in err and "--resume" in err
    assert not second.exists()
    with command(job, second, *words, "--resume") as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    went_on = losses(second)
    assert min(went_on) > 1
    assert went_on == {step: loss for step, loss in losses(whole).items() if step >= min(went_on)}
    newest = checkpoint.latest(second / "checkpoints")
    assert newest is not None and newest.name == "step-40"
    assert [event["step"] for event in uploads(second)][-1] == 40
    told = err + "".join(path.read_text(errors="replace") for path in second.rglob("*") if path.suffix in TEXTS)
    assert SECRET not in told
    here, there = (verbs.generate(model, "def ", max_tokens=8)["text"] for model in (second, "s3://bucket/runs/job"))
    assert here == there


def test_a_run_that_is_asked_to_end_leaves_its_last_step_in_the_store(server: S3Server, tmp_path: Path) -> None:
    job, run = new_job(tmp_path / "job"), tmp_path / "run"
    words = ("checkpoint.url=s3://bucket/runs/job", "layout.dp=1", "cluster.devices=1", "train.steps=100000")
    with command(job, run, *words, "checkpoint.every=0", "train.eval_every=0") as process:
        eventually(lambda: len(losses(run)) >= 2, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert "resume with" in err, err
    (held,) = RunCopy("s3://bucket/runs/job").checkpoints()
    assert held.about["step"] == last(run, "end")["step"] == uploads(run)[-1]["step"]


TEXTS = (".toml", ".json", ".jsonl", ".log", ".html")


def test_a_store_that_dies_costs_no_checkpoint(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = new_job(tmp_path / "job"), tmp_path / "run"
    words = ("checkpoint.url=s3://bucket/runs/job", "layout.dp=1", "cluster.devices=1")
    with command(job, run, *words) as process:
        eventually(lambda: bool(uploads(run)), process)
        server.kill()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 4
    assert "the newest checkpoint is in the run folder and not in the store" in err and "--resume" in err
    assert sorted(losses(run))[-1] == 40 and "did not answer" in uploads(run)[-1]["error"]
    checkpoint.check(run / "checkpoints" / "step-40")
    with s3_server() as another:  # the old one's objects are lost with it
        another.lead_here(monkeypatch, another.port)
        with command(job, run, *words, "--resume") as process:
            _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert uploads(run)[-1]["step"] == 40
        held = another.files().find("bucket/runs/job/checkpoints")
    assert any(path.endswith("objects.json") and "/step-40-" in path for path in held)
