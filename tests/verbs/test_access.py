"""A detached run, followed and ended from another terminal than the one that started it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright import verbs
from meshwright.errors import InputError, RunFailed
from meshwright.run import RunFolder
from tests.launch.agents import PATHS, alive, eventually

JOB = """
[model]
family = "llama"
layers = 1
hidden = 16
heads = 2
ffn = 32
vocab = 257
[data]
source = "words.txt"
seq_len = 16
tokenizer = "bytes"
[train]
steps = 1000000
lr = 1e-3
global_batch = 2
precision = "fp32"
[cluster]
devices = 1
[layout]
dp = 1
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
MESHWRIGHT = [sys.executable, "-m", "meshwright"]


def new_job(folder: Path) -> Path:
    (folder / "words.txt").write_text("the words of a small text, again and again\n" * 200)
    job = folder / "job.toml"
    job.write_text(JOB)
    return job


def state_of(run: Path) -> dict[str, Any]:
    (found,) = verbs.status([run])
    return found


def trains(run: Path) -> bool:
    found = state_of(run)
    return found["state"] == "running" and (found["step"] or 0) >= 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run at work whose terminal, with all that was started from it, is gone."""
    folder = tmp_path_factory.mktemp("detached")
    new_job(folder)
    terminal = subprocess.Popen(
        ["sh", "-c", f"{' '.join(MESHWRIGHT)} train job.toml --detach --json > said; sleep 600"],
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    said = folder / "said"
    assert eventually(lambda: said.exists() and said.read_text().endswith("}\n"), 120)
    for number in (signal.SIGHUP, signal.SIGKILL):
        os.killpg(terminal.pid, number)
    terminal.wait()
    told = json.loads(said.read_text())
    path = folder / "runs" / "job"
    assert told == {"run": "runs/job", "pid": told["pid"], "log": "runs/job/logs/driver.log"}
    try:
        assert eventually(lambda: trains(path)), state_of(path)
        yield path
    finally:
        if alive(told["pid"]):
            os.kill(told["pid"], signal.SIGTERM)
        assert eventually(lambda: not alive(told["pid"]))


def test_its_state_is_shown_from_another_process(run: Path) -> None:
    done = subprocess.run(
        [*MESHWRIGHT, "status", "--json"], cwd=run.parents[1], env=ENVIRONMENT, capture_output=True, text=True
    )
    (found,) = json.loads(done.stdout)
    assert (found["run"], found["state"], found["generation"]) == ("runs/job", "running", 1)
    assert [(rank["rank"], rank["state"]) for rank in found["ranks"]] == [(0, "running")]
    assert len(found["nodes"]) == 1 and found["tokens_per_second"] > 0 and found["steps"] == 1000000


def test_who_may_read_may_not_stop(run: Path, tmp_path: Path) -> None:
    given = tmp_path / "run"
    (given / "hub").mkdir(parents=True)
    shutil.copy2(run / "hub" / "readers.json", given / "hub")
    assert state_of(given)["state"] == "running"
    with pytest.raises(InputError, match="is not at work"):
        verbs.stop(given)  # it was not given the file for that
    shutil.copy2(run / "hub" / "readers.json", given / "hub" / "people.json")
    with pytest.raises(InputError, match="the hub refuses its secret"):
        verbs.stop(given)
    os.chmod(given / "hub" / "readers.json", 0o644)
    with pytest.raises(InputError, match="others can read it"):
        verbs.status([given])
    assert trains(run)


def test_logs_are_printed_followed_and_named(run: Path) -> None:
    with open(run / "logs" / "rank-0.log", "a") as log:
        log.write("a word of rank 0\nand half a ")
        log.flush()
        assert ("rank-0", "a word of rank 0") in list(verbs.logs(run, rank=0))
        assert {name for name, _ in verbs.logs(run)} >= {"rank-0"}
        command = [*MESHWRIGHT, "logs", str(run), "--rank", "0", "--follow"]
        follower = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert follower.stdout is not None
        try:
            while follower.stdout.readline() != "a word of rank 0\n":
                assert follower.poll() is None
            log.write("line\nlater\n")
            log.flush()
            assert [follower.stdout.readline() for _ in range(2)] == ["and half a line\n", "later\n"]
            assert follower.poll() is None
        finally:
            follower.kill()
            follower.communicate()
    with pytest.raises(InputError, match=r"has no log of rank 3.*there are: driver, rank-0"):
        verbs.logs(run, rank=3)


def test_a_log_that_comes_later_is_followed_too(run: Path) -> None:
    lines = verbs.logs(run, follow=True)
    next(lines)
    (run / "logs" / "rank-7.log").write_text("of a later generation\n")
    try:
        assert ("rank-7", "of a later generation") in itertools.islice(lines, 10_000)
    finally:
        (run / "logs" / "rank-7.log").unlink()


def test_a_run_that_cannot_be_read_does_not_hide_the_others(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "hub").mkdir(parents=True)
    (other / "hub" / "readers.json").write_text("{}")
    (other / "hub" / "readers.json").chmod(0o644)  # what a secret's file may not be
    readable, unreadable = verbs.status([run, other])
    assert readable["state"] == "running"
    assert unreadable["state"] == "unreadable" and "others can read it" in unreadable["failures"][0]
    with pytest.raises(InputError, match="others can read it"):
        verbs.status([other])


def test_a_run_at_work_is_not_started_twice(run: Path) -> None:
    for arguments in (["--detach"], ["--detach", "--resume"]):
        done = subprocess.run(
            [*MESHWRIGHT, "train", "job.toml", *arguments],
            cwd=run.parents[1],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "holds a run already" in done.stderr or "is at work in it" in done.stderr
    assert trains(run)


def test_it_is_stopped_and_saves_and_the_state_says_so(run: Path) -> None:
    """The last test of this run."""
    found = verbs.stop(run)
    assert found["state"] == "stopped"
    assert (run / "checkpoints" / f"step-{found['step']}" / "manifest.json").exists()
    assert not (run / "hub").exists()
    assert state_of(run)["state"] == "stopped"
    assert "--resume" in (run / "logs" / "driver.log").read_text()
    with pytest.raises(InputError, match="is not at work"):
        verbs.stop(run)


def test_what_is_no_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert verbs.status() == []
    for verb in (lambda path: verbs.status([path]), verbs.stop, verbs.logs):
        with pytest.raises(InputError, match=r"nothing: holds no run.*runs here: none"):
            verb("nothing")


def test_a_run_whose_driver_was_killed_cannot_be_reached(tmp_path: Path) -> None:
    """Its files are still there."""
    from meshwright.launch.hub_files import HubFiles

    run = tmp_path / "run"
    files = HubFiles(run / "hub", [])
    kept = shutil.copytree(run, tmp_path / "kept")
    files.close()
    assert state_of(kept)["state"] == "unreachable"
    with pytest.raises(RunFailed, match="does not answer: its driver was killed"):
        verbs.stop(kept)


def test_a_job_that_is_refused_ends_as_without_detaching(tmp_path: Path) -> None:
    done = subprocess.run(
        [*MESHWRIGHT, "train", "none.toml", "--detach"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "none.toml: no such job file" in done.stderr


@pytest.mark.slow
def test_a_detached_run_goes_on_without_its_driver_until_another_takes_it_over(tmp_path: Path) -> None:
    """Its ranks are the same, and no step is made twice or missing."""
    new_job(tmp_path)
    run = tmp_path / "runs" / "job"
    command = [*MESHWRIGHT, "train", "job.toml", "launch.on=agents", "launch.address=127.0.0.1:0"]
    agent = [sys.executable, "-m", "meshwright.launch.agent", "--run", str(run), "--devices", "1", "--node", "a"]
    agents = subprocess.Popen(agent, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    drivers: list[int] = []

    def detach(*words: str) -> None:
        done = subprocess.run(
            [*command, "--detach", "--json", *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        drivers.append(json.loads(done.stdout)["pid"])

    try:
        detach()
        assert eventually(lambda: trains(run)), (run / "logs" / "driver.log").read_text()
        (rank,) = _children(agents.pid)
        os.kill(drivers[0], signal.SIGKILL)
        assert eventually(lambda: not alive(drivers[0]))
        time.sleep(8)  # longer than agents wait for a driver that is not detached
        assert alive(rank) and state_of(run)["state"] == "unreachable"
        last = state_of(run)["step"]
        detach("--resume")
        assert eventually(lambda: state_of(run)["state"] == "running" and state_of(run)["step"] > last + 5)
        assert _children(agents.pid) == [rank] and alive(rank)
        found = verbs.stop(run)
        assert found["state"] == "stopped"
        assert agents.wait(20) == 0
    finally:
        for pid in drivers:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        agents.kill()
        agents.communicate()
    events = RunFolder(run).read_events()
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, found["step"] + 1))
    assert [event["event"] for event in events].count("start") == 1


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_name_and_no_rank_is_left(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        job, run = new_job(tmp_path), disk / "run"
        command = [*MESHWRIGHT, "train", str(job), "--run", str(run)]
        driver = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert eventually(lambda: (run / "hub").exists() and trains(run))
        (rank,) = _children(driver.pid)
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(1 << 12))
        _, said = driver.communicate(timeout=60)
        said = "\n".join(line for line in said.splitlines() if "/1000000" not in line)
        assert driver.returncode == 4, said
        assert "events.jsonl: cannot be written: " in said, said
        assert "not expected" not in said and "Traceback" not in said
        assert "--resume" in said
        assert eventually(lambda: not alive(rank))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _children(pid: int) -> list[int]:
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in found for word in text.split()]
