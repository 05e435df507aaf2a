"""Runs over hosts of which some see neither the run folder nor the data: empty disks lie over both folders there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright import checkpoint, verbs
from meshwright.checkpoint.tensors import DTYPES
from meshwright.layout import Box
from meshwright.placement import Placement
from meshwright.run import RunFolder
from tests.hosts import Host, hosts
from tests.train.test_runs import losses, new_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

JOB = """
[model]
family = "llama"
layers = 2
hidden = 64
heads = 2
ffn = 128
vocab = 257
[data]
source = "corpus"
seq_len = 16
tokenizer = "bytes"
[train]
steps = 30
lr = 1e-3
global_batch = 12
precision = "fp32"
decay = "constant"
warmup_steps = 0
compile = false
[cluster]
devices = 3
[layout]
micro_batch = 2
shard = 1
[checkpoint]
every = 10
keep = 3
"""


#: Prints the nodes that attend the hub whose files are in a folder.
ATTENDING = """
import pathlib, sys
from meshwright.launch.people import hub_status
print(*(node.name for node in hub_status(pathlib.Path(sys.argv[1])).nodes))
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The measure: the whole run on this machine."""
    folder = tmp_path_factory.mktemp("local")
    verbs.train(new_job(folder / "job", JOB), run=folder / "run")
    return RunFolder(folder / "run")


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[Host, ...]]:
    """Hosts of which the second and the third do not see `run` and `job`, two folders of `tmp_path`."""
    new_job(tmp_path / "job", JOB)
    (tmp_path / "run").mkdir()
    with hosts(3) as made:
        for host in made[1:]:
            host.hide(tmp_path / "run")
            host.hide(tmp_path / "job")
        yield made


class Over:
    """A run over hosts: its driver on the first, agents where they are asked for."""

    def __init__(self, driver_host: Host, folder: Path) -> None:
        self.driver_host, self.folder, self.run = driver_host, folder, RunFolder(folder / "run")
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.driver: Any = None
        self.agents: list[Any] = []

    def drive(self, *words: str) -> None:
        """Starts `meshwright train`."""
        host, job = self.driver_host, self.folder / "job" / "job.toml"
        address = f"launch.address={host.address}:0"
        command = [
            sys.executable,
            "-m",
            "meshwright",
            "train",
            job,
            "--run",
            self.run.path,
            "launch.on=agents",
            address,
        ]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": self.env}
        self.driver = host.start([*command, *words], **options)

    def agent(self, host: Host) -> None:
        """Starts an agent with one device, by a copy of the access file."""
        given = self.run.hub / "agents.json"
        eventually(given.exists, self.driver)
        access = self.folder / "access.json"
        if not self.agents:
            access.touch(mode=0o600)
            access.write_bytes(given.read_bytes())
        own = self.temporary(host)
        own.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "meshwright.launch.agent", "--access", access, "--devices", "1"]
        self.agents.append(host.start(command, env={**self.env, "TMPDIR": str(own)}, stderr=subprocess.DEVNULL))

    def temporary(self, host: Host) -> Path:
        return self.folder / f"temporary-{host.name}"

    def attending(self) -> list[str]:
        done = self.driver_host.run([sys.executable, "-c", ATTENDING, self.run.hub])
        assert done.returncode == 0, done.stderr
        return str(done.stdout).split()

    def end(self) -> tuple[int, str]:
        """Waits for the end; the driver's exit code and what it said."""
        _, said = self.driver.communicate(timeout=200)
        return self.driver.returncode, said


@contextmanager
def over(driver_host: Host, agents: Sequence[Host], folder: Path, *words: str) -> Iterator[Over]:
    """Rank 0 is on the first of `agents`."""
    run = Over(driver_host, folder)
    run.drive(*words)
    for number, host in enumerate(agents):
        run.agent(host)
        if number == 0:
            eventually(lambda: run.attending() == [agents[0].name], run.driver)
    yield run


def eventually(true: Callable[[], object], driver: Any) -> None:
    deadline = time.monotonic() + 100
    while not true():
        assert not driver.poll(), f"ended before its time with {driver.returncode}: {driver.communicate()}"
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.005)


def reach(run: RunFolder, step: int) -> Callable[[], bool]:
    return lambda: (run.checkpoints / f"step-{step}" / "manifest.json").exists()


def assert_same_content(one: Path, two: Path) -> None:
    """Whether two checkpoints hold the same, read as one device reads them."""
    names = set()
    for folder in (one, two):
        manifest = checkpoint.read_manifest(folder)
        boxes = {name: Box.whole(tensor.global_shape) for name, tensor in manifest.tensors.items()}
        names |= {(name, box, manifest.tensors[name].dtype) for name, box in boxes.items()}
    assert len(names) == len(boxes) > 20
    held = [
        {name: (Placement(name, box, 1, True), torch.empty(box.shape, dtype=DTYPES[kind])) for name, box, kind in names}
        for _ in range(2)
    ]
    for folder, tensors in zip((one, two), held, strict=True):
        checkpoint.load(folder, tensors)
    assert all(held[0][name][1].equal(tensor) for name, (_, tensor) in held[1].items())


def test_a_run_where_rank_0_does_not_see_the_disk_is_as_on_this_machine(
    three: tuple[Host, ...], local: RunFolder, tmp_path: Path
) -> None:
    first, second, third = three
    with over(first, [second, third, first], tmp_path, "train.steps=20") as run:
        code, said = run.end()
    assert code == 0, said
    words = "does not see the run folder's disk: its ranks copy job, data and checkpoint from the driver, and save"
    assert f"node host-2 {words}" in said and f"node host-3 {words}" in said and f"node host-1 {words}" not in said
    events = run.run.read_events()
    kinds = [event["event"] for event in events]
    assert sorted(event["node"] for event in events if event["event"] == "without-disk") == ["host-2", "host-3"]
    assert max(at for at, kind in enumerate(kinds) if kind == "without-disk") < kinds.index("step")
    places = json.loads(run.run.trace.read_text())["traceEvents"]
    assert {event["pid"] for event in places} == {0, 1, 2}
    expected = losses(local.path)
    assert losses(run.run.path) == {step: loss for step, loss in expected.items() if step <= 20}  # bit for bit
    for step in ("step-10", "step-20"):
        checkpoint.check(run.run.checkpoints / step)
        assert_same_content(run.run.checkpoints / step, local.checkpoints / step)
    copied = ["copied job, plan and data from" in (run.run.logs / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert copied[0] and sum(copied) == 2
    told = [event for event in run.run.read_events() if event["event"] == "copied"]
    assert len(told) == 2 and all(event["bytes"] > 1000 for event in told)
    for host in (second, third):
        assert list(run.temporary(host).glob("meshwright-*")) == []  # nothing is left
        assert host.run(["find", str(run.run.path), "-mindepth", "1"]).stdout == ""

    words_of_two = ["cluster.devices=2", "layout.dp=2", "--resume"]
    with over(first, [third, second], tmp_path, *words_of_two) as again:  # no agent sees the disk
        code, said = again.end()
    assert code == 0, said
    assert "copied checkpoint step-20 from the driver" in (run.run.logs / "rank-0.log").read_text()
    assert losses(run.run.path) == pytest.approx(expected, rel=1e-5) and len(expected) == 30


def test_a_host_that_is_killed_in_the_middle_of_a_save_costs_only_that(
    three: tuple[Host, ...], local: RunFolder, tmp_path: Path
) -> None:
    first, second, third = three
    with over(first, [second, third, first], tmp_path, "checkpoint.every=1") as run:
        checkpoints = run.run.checkpoints
        eventually(reach(run.run, 3), run.driver)
        while True:
            eventually(lambda: list(checkpoints.glob(".saving-*/step-*.partial-*/state")), run.driver)
            third.stop()
            time.sleep(0.5)  # a save that does not need this host any more is committed meanwhile
            if saving := list(checkpoints.glob(".saving-*/step-*.partial-*/state")):
                break
            third.go_on()
        before = checkpoint.latest(checkpoints)
        assert before is not None
        third.kill()
        unfinished = int(saving[0].parent.name.removeprefix("step-").partition(".")[0])
        recovered = [event["step"] for event in _until_recovery(run)]
        assert recovered == [checkpoint.read_manifest(before).step] == [unfinished - 1]
        code, said = run.end()
    assert code == 0, said
    assert losses(run.run.path) == pytest.approx(losses(local.path), rel=1e-5)
    assert not list(checkpoints.glob("*/*.partial-*"))


def _until_recovery(run: Over) -> list[dict[str, Any]]:
    """Waits until the run has gone on; its recoveries."""

    def recoveries() -> list[dict[str, Any]]:
        return [event for event in run.run.read_events() if event["event"] == "recovery"]

    eventually(recoveries, run.driver)
    return recoveries()


def test_a_driver_that_is_killed_is_awaited_in_the_middle_of_saves(three: tuple[Host, ...], tmp_path: Path) -> None:
    """Ranks of a detached run go on, and what they read and write at the driver waits for the next one."""
    first, second, third = three
    words = ["train.steps=40", "cluster.devices=2", "checkpoint.every=1"]
    with over(first, [second, third], tmp_path, *words, "--detach") as run:
        eventually(reach(run.run, 3), run.driver)
        facts = json.loads((run.run.hub / "hub.json").read_text())
        os.kill(facts["pid"], signal.SIGKILL)
        time.sleep(3)  # several steps, each of which would be saved
        run.drive("--resume", *words)
        code, said = run.end()
    assert code == 0, said
    kinds = [event["event"] for event in run.run.read_events()]
    assert kinds.count("start") == 1 and "recovery" not in kinds and "failure" not in kinds
    assert sorted(losses(run.run.path)) == list(range(1, 41))
