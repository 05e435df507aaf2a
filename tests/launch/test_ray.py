"""A job on a real Ray of three hosts: the same run as on this machine, through every fault of a host."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright import checkpoint, verbs
from meshwright.errors import InputError
from meshwright.run import RunFolder
from tests.hosts import hosts
from tests.launch.agents import PATHS
from tests.ray_cluster import RayCluster, ray_cluster
from tests.train.test_runs import new_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, BATCH = 60, 12
JOB = f"""
[model]
family = "llama"
layers = 2
hidden = 32
heads = 4
ffn = 64
vocab = 300
[data]
source = "corpus"
seq_len = 32
tokenizer = "bytes"
[train]
steps = {STEPS}
lr = 3e-3
global_batch = {BATCH}
precision = "fp32"
compile = false
[cluster]
devices = 3
[layout]
micro_batch = 2
recompute = "none"
[checkpoint]
every = 10
"""
ENDLESS = ["train.steps=100000", "train.decay=constant", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    pytest.importorskip("ray")
    with ray_cluster(tmp_path_factory.mktemp("ray"), cpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_job(tmp_path_factory.mktemp("job"), JOB)


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run on this machine."""
    run = RunFolder(tmp_path_factory.mktemp("local") / "run")
    verbs.train(job, ["layout.dp=3"], run=run.path)
    return run


def driver(cluster: RayCluster, job: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    """`meshwright train` on the head; what it prints goes to RUN.log."""
    command = [sys.executable, "-m", "meshwright", "train", str(job), "--run", str(run)]
    command += ["launch.on=ray", f"launch.address={cluster.address}", *words]
    with open(f"{run}.log", "w") as log:
        started: subprocess.Popen[str] = cluster.head.start(
            command, env=cluster.environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    return started


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in run.steps()]


def starts(run: RunFolder) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == "start"]


def until(true: Callable[[], bool], process: subprocess.Popen[str], run: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, Path(f"{run}.log").read_text()
        assert time.monotonic() < deadline, Path(f"{run}.log").read_text()
        time.sleep(0.05)


def test_losses_are_those_of_this_machine_bit_for_bit(
    cluster: RayCluster, job: Path, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = driver(cluster, job, run, "layout.dp=3", "cluster.devices_per_node=1")
    assert process.wait(240) == 0, Path(f"{run}.log").read_text()
    assert losses(RunFolder(run)) == losses(undisturbed)
    assert sorted(path.name for path in RunFolder(run).logs.iterdir()) == ["rank-0.log", "rank-1.log", "rank-2.log"]


def test_hosts_without_the_disk_reach_it_through_the_driver(
    cluster: RayCluster, job: Path, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run").create()
    for host in cluster.hosts[1:]:
        host.hide(run.path)
    process = driver(cluster, job, run.path, "layout.dp=3", "cluster.devices_per_node=1")
    assert process.wait(240) == 0, Path(f"{run.path}.log").read_text()
    named = [event["node"] for event in run.read_events() if event["event"] == "without-disk"]
    assert sorted(named) == sorted(host.name for host in cluster.hosts[1:])
    assert losses(run) == losses(undisturbed)
    checkpoint.check(run.checkpoints / f"step-{STEPS}")


def test_a_run_goes_on_through_a_cut_cable_a_host_held_still_and_a_host_that_loses_power(
    cluster: RayCluster, job: Path, tmp_path: Path
) -> None:
    """One after the other; after each but the last the host comes back, and is used again. Then the run is stopped."""
    run = RunFolder(tmp_path / "run")
    endless = [*ENDLESS, "checkpoint.every=5"]
    process = driver(cluster, job, run.path, *endless)

    def goes_on_after(number: int) -> float:
        """Seconds until a step of start `number` (from 1) has been made."""
        began = time.monotonic()

        def stepped() -> bool:
            events = run.read_events() if run.events.exists() else []
            begun = [index for index, event in enumerate(events) if event["event"] == "start"]
            return len(begun) >= number and any(e["event"] == "step" for e in events[begun[number - 1] :])

        until(stepped, process, run.path)
        return time.monotonic() - began

    goes_on_after(1)
    until(lambda: checkpoint.latest(run.checkpoints) is not None, process, run.path)
    seconds = []
    number = 1
    for host, break_it, mend in (
        (cluster.hosts[2], "cut", "mend"),
        (cluster.hosts[1], "stop", "go_on"),
        (cluster.hosts[2], "kill", None),
    ):
        getattr(host, break_it)()
        number += 1
        seconds.append(goes_on_after(number))
        if mend is not None:
            getattr(host, mend)()
            number += 1
            goes_on_after(number)
    assert max(seconds) < 30, seconds
    verbs.stop(run.path)
    assert process.wait(60) == 4, Path(f"{run.path}.log").read_text()
    assert [start["layout"]["dp"] for start in starts(run)] == [3, 2, 3, 2, 3, 2]
    failures = [event["reason"] for event in run.read_events() if event["event"] == "failure"]
    assert len(failures) == 3 and all("host-" in reason for reason in failures)
    # No sample is lost or used twice: what was committed is every batch once, in its order.
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    manifest = checkpoint.read_manifest(newest)
    assert manifest.meta["samples"] == manifest.step * BATCH and len(losses(run)) == manifest.step
    alone = RunFolder(tmp_path / "alone")
    verbs.train(job, ["cluster.devices=1", *endless, f"train.steps={manifest.step}"], run=alone.path)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_slow_cables_keep_tensor_groups_on_a_host(cluster: RayCluster, job: Path, tmp_path: Path) -> None:
    for host in cluster.hosts:
        host.limit(1000)
    try:
        run = RunFolder(tmp_path / "run")
        words = ["cluster.devices=4", "layout.tp=2", "train.steps=4", "launch.devices_min=4"]
        process = driver(cluster, job, run.path, *words)

        def placed() -> bool:
            return (run.hub / "hub.json").exists() and bool(json.loads((run.hub / "hub.json").read_text())["places"])

        until(placed, process, run.path)
        places = {place["rank"]: place["node"] for place in json.loads((run.hub / "hub.json").read_text())["places"]}
        assert process.wait(240) == 0, Path(f"{run.path}.log").read_text()
        assert len(set(places.values())) == 2 and places[0] == places[1] and places[2] == places[3]
    finally:
        for host in cluster.hosts:
            host.limit(None)


def refusal(cluster: RayCluster, job: Path, run: Path, *words: str, **options: Any) -> tuple[str, float]:
    """What the command says, and the seconds that it takes beyond those of a command that finds nothing to do."""
    command = [sys.executable, "-m", "meshwright", "train", str(job), "--run", str(run), "launch.on=ray", *words]
    began = time.monotonic()
    done = options.pop("host", cluster.head).run(command, env={**cluster.environment, **options}, timeout_seconds=120)
    assert done.returncode in (2, 3), done.stderr
    return done.stderr, time.monotonic() - began


def test_what_cannot_work_is_told_before_ray_would(cluster: RayCluster, job: Path, tmp_path: Path) -> None:
    at = f"launch.address={cluster.address}"
    words, _ = refusal(cluster, job, tmp_path / "a", at, "cluster.devices=9")
    assert "9 devices are needed; there are " in words and "host-1 (2 cpu devices" in words and "nearest: " in words
    words, seconds = refusal(cluster, job, tmp_path / "b", at, RAY_AUTH_TOKEN_PATH=os.devnull)
    assert "token is missing" in words and seconds < 15
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    words, seconds = refusal(cluster, job, tmp_path / "c", at, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "refuses the token" in words and seconds < 18
    words, _ = refusal(cluster, job, tmp_path / "d", f"launch.address={cluster.head.address}:9")
    assert "no Ray cluster answers at" in words
    assert not list(tmp_path.glob("?/job.toml"))


def test_an_open_cluster_is_refused_with_the_command_that_closes_it(job: Path, tmp_path: Path) -> None:
    with hosts(1) as made:
        cluster = RayCluster(made, tmp_path, cpus=1)
        cluster.environment |= {"RAY_AUTH_MODE": "disabled"}
        del cluster.environment["RAY_AUTH_TOKEN_PATH"]
        cluster.start(cluster.head)
        at, with_token = f"launch.address={cluster.address}", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        words, _ = refusal(cluster, job, tmp_path / "run", at, **with_token)
    assert f"the Ray cluster at {cluster.address} asks for no token" in words
    assert "RAY_AUTH_MODE=token ray start --head --port=6379" in words
    assert not (tmp_path / "run" / "job.toml").exists()


def test_a_host_that_is_drained_is_left_after_a_save(cluster: RayCluster, job: Path, tmp_path: Path) -> None:
    """The last test of this cluster: a host that was drained stays so."""
    run, leaving = RunFolder(tmp_path / "run"), cluster.hosts[2]
    if not leaving.processes():  # another test has killed it
        cluster.start(leaving)
    process = driver(cluster, job, run.path, *ENDLESS, "checkpoint.every=0")
    until(lambda: run.events.exists() and len(run.steps()) >= 5, process, run.path)
    drain(cluster, leaving.address)
    until(lambda: len(starts(run)) == 2 and run.read_events()[-1]["event"] == "step", process, run.path)
    places = json.loads((run.hub / "hub.json").read_text())["places"]
    assert len(places) == 2 and leaving.name not in {place["node"] for place in places}
    verbs.stop(run.path)
    assert process.wait(60) == 4, Path(f"{run.path}.log").read_text()
    events = run.read_events()
    assert [start["layout"]["dp"] for start in starts(run)] == [3, 2]
    assert not [event for event in events if event["event"] == "failure" and "host" in event["reason"]]
    begun = [index for index, event in enumerate(events) if event["event"] == "start"]
    saved = [event["step"] for event in events[: begun[1]] if event["event"] == "checkpoint"]
    made = [event["step"] for event in events if event["event"] == "step"]
    assert saved == [max(event["step"] for event in events[: begun[1]] if event["event"] == "step")]
    assert made == list(range(1, len(made) + 1))  # none is made twice


def drain(cluster: RayCluster, address: str) -> None:
    """Tells Ray that a node will end."""
    find = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); living = filter(lambda n: n['Alive'], "
    find += "ray.nodes()); print(*(node['NodeID'] for node in living if node['NodeManagerAddress'] == sys.argv[2]))"
    found = cluster.drive(find, cluster.address, address)
    assert found.returncode == 0, found.stderr
    node = ["--address", cluster.address, "--node-id", found.stdout.split()[-1]]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    ray = str(Path(sys.executable).with_name("ray"))
    done = cluster.head.run([ray, "drain-node", *node, *why], env=cluster.environment)
    assert done.returncode == 0, done.stderr


def test_what_listens_and_is_no_cluster_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshwright.launch import ray

    monkeypatch.setattr(ray, "ANSWER_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match=f"what listens at {address} has not answered as a Ray cluster within 2 s"):
            ray._require_cluster(address)


def test_a_cluster_that_is_started_for_the_job(job: Path, tmp_path: Path) -> None:
    """On this machine, in a process of its own: Ray reads its environment once."""
    command = [sys.executable, "-m", "meshwright", "train", str(job), "--run", str(tmp_path / "run"), "launch.on=ray"]
    words = ["cluster.devices=2", "layout.dp=2", "train.steps=3"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(losses(RunFolder(tmp_path / "run"))) == 3


def test_why_an_agent_cannot_attend_is_told(tmp_path: Path) -> None:
    code = """
from meshwright import launch
from meshwright.errors import CannotWork
from meshwright.launch.backends import remote_backend
group = launch.RankGroup("rank", "tests.launch.workers:where", {}, 1)
try:
    launch.start(remote_backend("ray", None, "none0", 1), [group], "logs", start_seconds=30).wait(60)
except CannotWork as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": PATHS}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "the agent on node " in done.stdout and "'none0' has no IPv4 address" in done.stdout, done.stderr
