"""Whole runs through the command: what they write, and going on after everything was killed.

One uninterrupted run is the measure. Runs are tiny; the layouts are pinned, so that every machine runs the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshwright import checkpoint, verbs
from meshwright.errors import InputError
from meshwright.run import RunFolder
from tests.checkpoint.pickles import assert_no_pickles

pytestmark = pytest.mark.timeout(600)

STEPS = 40
JOB = f"""
[model]
family = "llama"
layers = 2
hidden = 32
heads = 4
kv_heads = 2
ffn = 64
vocab = 300
[data]
source = "corpus"
seq_len = 32
tokenizer = "bytes"
held_out = 0.2
[train]
steps = {STEPS}
lr = 3e-3
global_batch = 8
precision = "fp32"
eval_every = 20
eval_batches = 2
compile = false
[cluster]
devices = 2
[layout]
dp = 2
micro_batch = 2
[checkpoint]
every = 5
keep = 3
"""
#: Overrides that make the run another layout, or another number of processes.
OTHERS = {
    "tensor": ["layout.dp=1", "layout.tp=2", "layout.sequence_parallel=true"],
    "pipeline": ["layout.dp=1", "layout.pp=2"],
    "one process": ["layout.dp=1", "cluster.devices=1"],
    "four processes": ["layout.shard=2", "layout.pp=2", "cluster.devices=4"],
}


def new_job(folder: Path, text: str = JOB) -> Path:
    (folder / "corpus").mkdir(parents=True)
    for name in ("os", "json", "re", "glob", "stat", "calendar", "csv", "cmd", "shlex", "queue", "bisect", "heapq"):
        module = __import__(name)
        shutil.copyfile(str(module.__file__), folder / "corpus" / f"{name}.txt")
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


@contextlib.contextmanager
def command(job: Path, run: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`meshwright train` in a process of its own, killed with all that it started on the way out."""
    arguments = [sys.executable, "-m", "meshwright", "train", str(job), "--run", str(run), *words]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        try:
            yield process
        finally:
            kill_everything(process.pid)


def kill_everything(pid: int) -> None:
    """Kill -9 the process and all that it started, at once."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family[1:], timeout=30)


def eventually(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, f"ended before its time with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.005)


def losses(run: Path) -> dict[int, float]:
    return {step["step"]: step["loss"] for step in RunFolder(run).steps()}


def last(run: Path, kind: str) -> dict[str, Any]:
    return [event for event in RunFolder(run).read_events() if event["event"] == kind][-1]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def uninterrupted(job: Path) -> Path:
    run = job.parent / "uninterrupted"
    verbs.train(job, run=run)
    return run


@pytest.fixture(scope="module")
def killed(job: Path) -> Path:
    """A run all of whose processes were killed some steps after a checkpoint."""
    run = job.parent / "killed"
    with command(job, run) as process:
        eventually(lambda: len(losses(run)) >= 13, process)
        kill_everything(process.pid)
    assert last(run, "step")["step"] < STEPS, "the run was over before it could be killed"
    return run


def test_events_say_what_the_contract_says(uninterrupted: Path) -> None:
    events = RunFolder(uninterrupted).read_events()
    steps = [event for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        for name in ("loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "peak_bytes"):
            assert step[name] > 0, name
        assert step["predicted_step_seconds"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5, "it learnt something"
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == list(range(5, STEPS + 1, 5))
    evaluations = [event for event in events if event["event"] == "eval"]
    assert [event["step"] for event in evaluations] == [20, 40]
    assert evaluations[-1]["held_out_loss"] == events[-1]["held_out_loss"]
    assert events[-1]["bits_per_byte"] > 0 and events[-1]["finished"] is True


def test_the_run_folder_is_the_contracts_and_holds_no_pickle(uninterrupted: Path, tmp_path: Path) -> None:
    for name in ("job.toml", "plan.json", "events.jsonl", "manifest", "report.html", "trace.json"):
        assert (uninterrupted / name).exists(), name
    kept = sorted(path.name for path in (uninterrupted / "checkpoints").glob("step-*"))
    assert kept == ["step-30", "step-35", "step-40"]
    newest = uninterrupted / "checkpoints" / "step-40"
    assert (newest / "manifest.json").is_file() and (newest / "state").is_dir()
    config = json.loads((newest / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    copy = tmp_path / "run"
    shutil.copytree(uninterrupted, copy)
    for raw in (copy / "manifest").glob("*.bin"):  # plain arrays of numbers, read by numpy.memmap
        raw.rename(raw.with_suffix(".raw"))
    assert_no_pickles(copy)


def test_the_page_on_checkpoints_names_the_keys_of_a_manifest(uninterrupted: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text()
    said: dict[str, list[str]] = {}
    for row in re.findall(r"^\| (`.*)\|$", page.partition("## The manifest")[2].partition("\n## ")[0], re.MULTILINE):
        keys, meaning = (re.findall(r"`(\w+)`", cell) for cell in row.split(" | ", 1))
        said |= dict.fromkeys(keys, meaning)
    manifest = json.loads((uninterrupted / "checkpoints" / "step-40" / "manifest.json").read_text())
    tensor, file = (next(iter(manifest[key].values())) for key in ("tensors", "files"))
    assert said.keys() | {"sha256"} == manifest.keys()
    assert set(said["meta"]) == manifest["meta"].keys()
    assert set(said["tensors"]) == tensor.keys() | tensor["pieces"][0].keys()
    assert set(said["files"]) == file.keys()
    assert manifest["meta"]["samples"] == 40 * 8 and manifest["meta"]["job"]["train"]["steps"] == STEPS


def test_killed_and_resumed_is_the_same_run_bit_for_bit(job: Path, uninterrupted: Path, killed: Path) -> None:
    run = killed.with_name("same-layout")
    shutil.copytree(killed, run)
    from_step = checkpoint.read_manifest(checkpoint.latest(run / "checkpoints") or run).step
    assert 5 <= from_step < STEPS
    with command(job, run, "--resume") as process:
        _out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert last(run, "recovery")["step"] == from_step
    assert losses(run) == losses(uninterrupted)
    assert last(run, "end")["held_out_loss"] == last(uninterrupted, "end")["held_out_loss"]


@pytest.mark.parametrize(
    "other", [pytest.param(name, marks=[] if name == "tensor" else [pytest.mark.slow]) for name in OTHERS]
)
def test_resumed_on_another_layout_goes_on_alike(job: Path, uninterrupted: Path, killed: Path, other: str) -> None:
    run = killed.with_name(f"resumed-{other.replace(' ', '-')}")
    shutil.copytree(killed, run)
    verbs.train(job, OTHERS[other], run=run, resume=True)
    expected = losses(uninterrupted)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert losses(run) != expected, "another order of summing was expected to show in the last bits"
    ends = [last(each, "end") for each in (run, uninterrupted)]
    assert ends[0]["held_out_loss"] == pytest.approx(ends[1]["held_out_loss"], rel=1e-5)
    assert ends[0]["bits_per_byte"] == pytest.approx(ends[1]["bits_per_byte"], rel=1e-5)


def killed_while_saving(job: Path, run: Path) -> tuple[int, int] | None:
    """Trains until a save after the first is under way, then kills. Returns the committed step and the half-written
    one, or None if the save was over before the kill arrived."""
    checkpoints = run / "checkpoints"

    def saving() -> bool:
        return any(checkpoints.glob(".saving-*/step-*.partial-*")) and checkpoint.latest(checkpoints) is not None

    with command(job, run) as process:
        eventually(saving, process)
        kill_everything(process.pid)
    half = [
        int(path.name.split(".")[0].removeprefix("step-")) for path in checkpoints.glob(".saving-*/step-*.partial-*")
    ]
    newest = checkpoint.latest(checkpoints)
    assert newest is not None
    committed = checkpoint.read_manifest(newest).step
    return (committed, half[0]) if half and half[0] > committed else None


def test_killed_during_a_save_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    sizes = {
        "hidden = 32": "hidden = 320",
        "ffn = 64": "ffn = 1280",
        "vocab = 300": "vocab = 8000",
        "every = 5": "every = 2",
    }
    text = JOB
    for small, large in sizes.items():
        text = text.replace(small, large)  # so that a save takes a while
    job = new_job(tmp_path / "job", text)
    found, run = None, tmp_path
    for attempt in range(5):
        run = tmp_path / f"run-{attempt}"
        found = killed_while_saving(job, run)
        if found:
            break
    assert found is not None, "no kill in five hit a save"
    committed, half_written = found
    assert half_written == committed + 2
    before = losses(run)
    with command(job, run, "--resume") as process:
        eventually(lambda: any(event["event"] == "recovery" for event in RunFolder(run).read_events()), process)
        eventually(lambda: last(run, "step")["step"] > max(before), process)
        kill_everything(process.pid)
    assert last(run, "recovery")["step"] == committed
    again = losses(run)
    assert {step: again[step] for step in before} == before, "steps done twice had the same losses"


def test_a_rank_that_dies_ends_the_run_with_the_command_that_resumes(job: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with command(job, run) as process:
        eventually(lambda: len(losses(run)) >= 7, process)
        workers = [p for p in psutil.Process(process.pid).children() if "meshwright.launch.worker" in p.cmdline()]
        assert len(workers) == 2
        workers[1].kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "rank 1 of 2" in err and "SIGKILL" in err and "Traceback" not in err
    assert f"resume with: meshwright train {job} --run {run} --resume" in err
    assert not any(worker.is_running() for worker in workers)


def files_of(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("job.toml", "plan.json", "events.jsonl")}


def test_a_second_process_does_not_train_in_a_run(job: Path, killed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    before = files_of(run)
    with RunFolder(run).lock(), pytest.raises(InputError, match=f"process {os.getpid()} on .* is at work in it"):
        verbs.train(job, ["train.lr=1e-3"], run=run, resume=True)
    fresh = RunFolder(tmp_path / "fresh").create()
    with fresh.lock(), pytest.raises(InputError, match="is at work in it"):
        verbs.train(job, run=fresh.path)
    assert files_of(run) == before and not fresh.job.exists()


def test_a_refused_resume_leaves_the_run_as_it_was(job: Path, killed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    before = files_of(run)
    with pytest.raises(InputError, match=r"the job ends at 3; nearest: train\.steps="):
        verbs.train(job, ["train.steps=3", "layout.micro_batch=4"], run=run, resume=True)
    assert files_of(run) == before


def test_a_resume_with_another_batch_size_goes_on_at_its_sample_and_says_what_changed(
    job: Path, uninterrupted: Path, killed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    step = checkpoint.read_manifest(checkpoint.latest(run / "checkpoints") or run).step
    others = [f"train.steps={step + 2}", "train.global_batch=4", "train.lr=1e-12"]  # a rate that changes no weight
    with pytest.raises(InputError, match=r"train\.seed: is 1, the run in .* was made with 0"):
        verbs.train(job, [*others, "train.seed=1"], run=run, resume=True)
    verbs.train(job, others, run=run, resume=True)
    recovery = last(run, "recovery")
    assert (recovery["step"], recovery["samples"]) == (step, 8 * step)
    assert recovery["train.global_batch"] == "8 -> 4" and recovery["train.lr"] == "0.003 -> 1e-12"
    assert recovery["train.steps"] == f"{STEPS} -> {step + 2}" and "train.seed" not in recovery
    halves = [losses(run)[step + 1], losses(run)[step + 2]]
    assert sum(halves) / 2 == pytest.approx(losses(uninterrupted)[step + 1], rel=1e-5)
    assert checkpoint.read_manifest(run / "checkpoints" / f"step-{step + 2}").meta["samples"] == 8 * step + 2 * 4


def test_a_resume_says_where_it_begins(job: Path, killed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run, ignore=shutil.ignore_patterns("step-*"))
    with command(job, run, "--resume", "train.steps=2", "cluster.devices=1", "layout.dp=1") as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "recovery: step 0, checkpoint none was committed: from the start" in err
    assert last(run, "recovery")["step"] == 0


def test_a_rank_that_is_asked_to_end_does_not_end_the_job(job: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with command(job, run) as process:
        eventually(lambda: len(losses(run)) >= 7, process)
        workers = [p for p in psutil.Process(process.pid).children() if "meshwright.launch.worker" in p.cmdline()]
        workers[1].terminate()
        _, err = process.communicate(timeout=120)
    step = last(run, "end")["step"]
    assert process.returncode == 4 and step < STEPS, err
    assert f"its processes were asked to end: saved at step {step} of {STEPS}" in err
    assert f"resume with: meshwright train {job} --run {run} --resume" in err
    assert (run / "checkpoints" / f"step-{step}" / "manifest.json").exists()


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_saves_first_and_can_be_resumed(
    job: Path, uninterrupted: Path, tmp_path: Path, asked: signal.Signals
) -> None:
    run = tmp_path / "run"
    with command(job, run, "train.eval_every=1") as process:
        eventually(lambda: len(losses(run)) >= 7, process)
        process.send_signal(asked)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "resume with: meshwright train" in err and "Traceback" not in err
    end = last(run, "end")
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None and newest.name == f"step-{end['step']}"
    assert end["finished"] is False and 7 <= end["step"] < STEPS
    if asked is signal.SIGTERM:
        verbs.train(job, run=run, resume=True)
        assert losses(run) == losses(uninterrupted)
