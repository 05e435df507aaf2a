"""`meshwright train` on three hosts: the losses of one machine, and what becomes of a run whose hosts fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshwright.run import RunFolder
from tests.hosts import Host, hosts
from tests.launch.agents import PATHS, eventually

pytestmark = pytest.mark.slow

BATCH, EVERY, STEPS = 12, 10, 160
JOB = f"""
[model]
family = "llama"
layers = 2
hidden = 32
heads = 2
ffn = 64
vocab = 257
[data]
source = "words.txt"
seq_len = 16
tokenizer = "bytes"
[train]
steps = {STEPS}
lr = 1e-4
global_batch = {BATCH}
precision = "fp32"
[checkpoint]
every = {EVERY}
keep = 1000
[cluster]
devices = 3
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
MESHWRIGHT = [sys.executable, "-m", "meshwright"]
AGENT = [sys.executable, "-m", "meshwright.launch.agent"]
#: So that a step takes about a tenth of a second, and a run lasts until its hosts have come and gone.
MEGABITS = 8.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hosts")
    lines = (f"{number} times {number} is {number * number}, and one more is odd\n" for number in range(3000))
    (found / "words.txt").write_text("".join(lines))
    (found / "job.toml").write_text(JOB)
    return found


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[int, float]:
    """The losses on this machine."""
    command = [*MESHWRIGHT, "train", "job.toml", "--run", "local"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return losses(RunFolder(folder / "local"))


def losses(run: RunFolder) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in run.steps()}


def starts(run: RunFolder) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == "start"]


def last_step(run: RunFolder) -> int:
    """The step that the newest generation has made last; 0 before its first."""
    events = run.read_events()
    if not events or not starts(run):
        return 0
    begun = max(index for index, event in enumerate(events) if event["event"] == "start")
    return max((event["step"] for event in events[begun:] if event["event"] == "step"), default=0)


class Cluster:
    """A run on hosts, each with an agent; the driver is on the first."""

    def __init__(self, group: tuple[Host, ...], folder: Path, run: str, *words: str) -> None:
        self.hosts, self.folder, self.run = group, folder, RunFolder(folder / run)
        self._log = folder / f"{run}-said"
        command = [*MESHWRIGHT, "train", "job.toml", "--run", run, "launch.on=agents", *words]
        with open(self._log, "w") as log:
            options = {"cwd": folder, "env": ENVIRONMENT, "stdout": log, "stderr": log}
            self.driver = group[0].start([*command, f"launch.address={group[0].address}:0"], **options)
            self.agents = {host.name: host.start([*AGENT, "--run", run, "--devices", "1"], **options) for host in group}

    def said(self) -> str:
        return self._log.read_text()

    def until(self, true: Any, seconds: float = 60) -> None:
        assert eventually(lambda: true() or self.driver.poll() is not None, seconds), self.said()
        assert true(), self.said()


@contextmanager
def cluster(folder: Path, run: str, *words: str, megabits: float | None = None) -> Iterator[Cluster]:
    with hosts(3) as group:
        if megabits is not None:
            for host in group[1:]:
                host.limit(megabits)
        yield Cluster(group, folder, run, *words)


def test_losses_are_those_of_one_machine_bit_for_bit(folder: Path, undisturbed: dict[int, float]) -> None:
    with cluster(folder, "apart") as at_work:
        assert at_work.driver.wait(90) == 0, at_work.said()
        assert {name: agent.wait(20) for name, agent in at_work.agents.items()} == dict.fromkeys(at_work.agents, 0)
        assert losses(at_work.run) == undisturbed
        assert len(starts(at_work.run)) == 1


@pytest.mark.parametrize("fault", ["kill", "cut", "stop"])
def test_a_host_that_fails_is_left_out_within_seconds_and_one_that_comes_back_joins(
    folder: Path, undisturbed: dict[int, float], fault: str
) -> None:
    with cluster(folder, fault, megabits=MEGABITS) as at_work:
        run, host = at_work.run, at_work.hosts[2]
        at_work.until(lambda: last_step(run) > 2 * EVERY + 5)
        begun = time.monotonic()
        {"kill": host.kill, "cut": host.cut, "stop": host.stop}[fault]()
        at_work.until(lambda: len(starts(run)) == 2 and last_step(run) > 0)
        assert time.monotonic() - begun < 30
        devices = [3, 2]
        if fault != "kill":  # its ranks, of a generation that is over, can commit nothing
            {"cut": host.mend, "stop": host.go_on}[fault]()
            at_work.until(lambda: len(starts(run)) == 3 and last_step(run) > 0)
            devices.append(3)
        else:  # and another ends in order
            at_work.agents["host-2"].terminate()
            at_work.until(lambda: len(starts(run)) == 3 and last_step(run) > 0)
            devices.append(1)
            events = run.read_events()
            last = max(index for index, event in enumerate(events) if event["event"] == "start")
            made = [event["step"] for event in events[:last] if event["event"] == "step"]
            assert events[last]["step"] == made[-1]  # it has lost no step
            assert at_work.agents["host-2"].wait(20) == 0
        assert at_work.driver.wait(90) == 0, at_work.said()
        assert at_work.said().count("its node host-3 ") == 1
        check(run, undisturbed, devices)


def check(run: RunFolder, undisturbed: dict[int, float], devices: Sequence[int]) -> None:
    """That what was committed is one run, without gap or repetition, with the losses of an undisturbed one; devices:
    of each generation."""
    found = losses(run)
    assert list(found) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - loss) / loss for step, loss in undisturbed.items()) < 1e-5
    manifests = [json.loads(path.read_text()) for path in run.checkpoints.glob("step-*/manifest.json")]
    committed = {manifest["step"]: manifest for manifest in manifests}
    begun = [event["step"] for event in starts(run)]
    assert len(begun) == len(devices) and begun == sorted(begun)
    assert {*begun[1:], *range(EVERY, STEPS + 1, EVERY)} == set(committed)
    for step, manifest in committed.items():
        generation = max(index for index, start in enumerate(begun) if start < step)
        assert manifest["meta"]["samples"] == BATCH * step
        assert manifest["world"] == devices[generation]
    steps = sorted(committed)
    assert [committed[step]["parent"] for step in steps] == [None, *steps[:-1]]
    assert [path.name for path in run.checkpoints.glob(".saving-*")] == [f".saving-{len(devices)}"]
