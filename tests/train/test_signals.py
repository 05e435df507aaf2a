"""Whole runs through the command that are asked to end in ways of their own, or whose progress nobody reads."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from meshwright import checkpoint
from meshwright.run import RunFolder
from tests.train.test_runs import OTHERS, command, eventually, last, losses, new_job

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    "second",
    [signal.SIGHUP, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_second_signal_does_not_cut_the_save_short(second: signal.Signals, tmp_path: Path) -> None:
    """A worker is held still until the command has had both signals: it can save only if the command waits for it."""
    job, run = new_job(tmp_path / "job"), tmp_path / "run"
    one = ("cluster.devices=1", "layout.dp=1", "train.steps=100000", "checkpoint.every=0", "train.eval_every=0")
    with command(job, run, *one) as process:
        eventually(lambda: len(losses(run)) >= 1, process)
        (worker,) = (p for p in psutil.Process(process.pid).children() if "meshwright.launch.worker" in p.cmdline())
        worker.suspend()
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        while "stopping: saving" not in process.stderr.readline():
            pass
        for number in (second, signal.SIGTERM, second):
            process.send_signal(number)
            time.sleep(0.1)
        assert process.poll() is None
        worker.resume()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "resume with: meshwright train" in err and "Traceback" not in err
    assert ("still stopping" in err) == (second is signal.SIGINT)
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None and newest.name == f"step-{last(run, 'end')['step']}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], *OTHERS.values()], ids=["data", *OTHERS])
def test_one_rank_that_is_asked_to_end_while_it_measures_ends_all(layout: list[str], tmp_path: Path) -> None:
    job, run = new_job(tmp_path / "job"), tmp_path / "run"
    long = ("data.seq_len=8", "train.eval_every=1", "train.eval_batches=100000", "checkpoint.every=0")
    with command(job, run, *long, *layout) as process:
        eventually(lambda: len(losses(run)) >= 1, process)
        workers = [p for p in psutil.Process(process.pid).children() if "meshwright.launch.worker" in p.cmdline()]
        time.sleep(0.2)  # the evaluation has begun
        workers[-1].terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "asked to end: saved at step 1 of" in err and not any(
        e["event"] == "eval" for e in RunFolder(run).read_events()
    )
    assert (run / "checkpoints" / "step-1" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["2>&1 | head -c1", "2>/dev/full"])
def test_progress_that_cannot_be_written_does_not_end_a_run(where: str, tmp_path: Path) -> None:
    job, run = new_job(tmp_path / "job"), tmp_path / "run"
    words = f"{job} --run {run} cluster.devices=1 layout.dp=1 train.steps=2"
    script = f"{sys.executable} -m meshwright train {words} {where}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert last(run, "end")["finished"] is True and (run / "report.html").exists()
