"""Jobs that were handed to a real Slurm are preempted and lose nodes, and end as one that nothing happened to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from meshwright import verbs
from meshwright.run import RunFolder
from tests.slurm import Slurm, slurm

pytestmark = pytest.mark.slow

STEPS = 500
JOB = f"""\
[model]
family = "llama"
layers = 3
hidden = 48
heads = 6
kv_heads = 2
ffn = 96
vocab = 300

[data]
source = "texts.txt"
seq_len = 32
tokenizer = "bytes"

[train]
steps = {STEPS}
lr = 1e-3
global_batch = 6
precision = "fp32"

[checkpoint]
every = 20

[cluster]
devices = 3
devices_per_node = 1
"""


def wait_for_step(run: RunFolder, step: int, cluster: Slurm, number: str) -> None:
    """Returns once that step is done, while the job runs."""
    deadline = time.monotonic() + 120
    while not any(event["event"] == "step" and event["step"] >= step for event in run.each_event()):
        state = cluster.job(number)
        assert time.monotonic() < deadline and state["JobState"] in ("RUNNING", "PENDING", "COMPLETING"), state
        time.sleep(0.2)


def job_of(folder: Path) -> Path:
    """A job file beside its data."""
    (folder / "texts.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(3000)))
    job = folder / "a job.toml"
    job.write_text(JOB)
    return job


def kill_one(cluster: Slurm, number: str) -> None:
    """A node of the job loses its power, but not the one that the driver is on."""
    at_work = cluster.run("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()
    batch_host = cluster.job(number)["BatchHost"]
    next(host for host in cluster.nodes if host.name in at_work and host.name != batch_host).kill()


def test_a_job_is_preempted_and_loses_a_node_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = job_of(tmp_path)
    undisturbed = verbs.train(job, run=tmp_path / "undisturbed")
    run = RunFolder(tmp_path / "run")
    submit = [
        sys.executable,
        "-m",
        "meshwright",
        "launch",
        str(job),
        "--on",
        "slurm",
        "--submit",
        "--run",
        str(run.path),
    ]
    with slurm(tmp_path / "slurm", nodes=4, cpus=1, grace_seconds=20) as cluster:
        number = cluster.run(*submit).split()[-1]  # "Submitted batch job 1"
        wait_for_step(run, 30, cluster, number)
        cluster.run("sbatch", "--partition=high", "--nodes=4", "--output=/dev/null", "--wrap", "sleep 1")
        cluster.wait(number, "PENDING", "RUNNING", restarts=1)
        saved = max(event["step"] for event in run.each_event() if event["event"] == "checkpoint")
        wait_for_step(run, saved + 60, cluster, number)

        kill_one(cluster, number)
        cluster.wait(number, "PENDING", "RUNNING", restarts=2)
        cluster.wait(number, "COMPLETED", restarts=2, timeout_seconds=180)
    events = list(run.each_event())
    resumed = [event["step"] for event in events if event["event"] == "recovery"]
    assert resumed[0] == saved and resumed[1] > saved  # what is left of the nodes goes on until Slurm ends the job
    losses = {event["step"]: event["loss"] for event in run.steps()}
    alone = {event["step"]: event["loss"] for event in RunFolder(undisturbed["run"]).steps()}
    assert list(losses) == list(alone) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(alone, rel=1e-5)


def test_where_fewer_nodes_are_enough_a_job_goes_on_without_a_lost_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, out, job = RunFolder(tmp_path / "run"), tmp_path / "out", job_of(tmp_path)
    verbs.launch(job, ["launch.devices_min=2"], on="slurm", write=out, run=run.path)
    with slurm(tmp_path / "slurm", nodes=3, cpus=1) as cluster:
        busy = cluster.run("sbatch", "--parsable", "--nodes=1", "--output=/dev/null", "--wrap", "sleep 600").strip()
        cluster.wait(busy, "RUNNING")
        number = cluster.submit(out / "job.sbatch")
        cluster.wait(number, "RUNNING")
        assert cluster.job(number)["NumNodes"] == "2"  # it does not wait for the third
        for one in (number, busy):
            cluster.run("scancel", one)
            cluster.wait(one, "CANCELLED")
        for host in cluster.nodes:
            cluster.wait_for_node(host, "idle")

        number = cluster.submit(out / "job.sbatch")
        wait_for_step(run, 30, cluster, number)
        assert cluster.job(number)["NumNodes"] == "3"
        kill_one(cluster, number)
        cluster.wait(number, "COMPLETED", timeout_seconds=180)
        assert cluster.job(number)["Restarts"] == "0"
    layouts = [event["layout"] for event in run.each_event() if event["event"] == "start"]
    devices = [layout["dp"] * layout["tp"] * layout["pp"] for layout in layouts]
    assert devices[-2:] == [3, 2]
    assert [event["step"] for event in run.steps()] == list(range(1, STEPS + 1))
