"""A job that was handed to a real Slurm is preempted, loses a node, and ends as one that nothing happened to."""

from __future__ import annotations

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


def test_a_job_is_preempted_and_loses_a_node_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "texts.txt").write_text("".join(f"line {i} of {i * i}\n" for i in range(3000)))
    job = tmp_path / "a job.toml"
    job.write_text(JOB)
    undisturbed = verbs.train(job, run=tmp_path / "undisturbed")
    run, out = RunFolder(tmp_path / "run"), tmp_path / "out"
    verbs.launch(job, on="slurm", write=out, run=run.path)
    with slurm(tmp_path / "slurm", nodes=4, cpus=1, grace_seconds=20) as cluster:
        number = cluster.submit(out / "job.sbatch")
        wait_for_step(run, 30, cluster, number)
        cluster.run("sbatch", "--partition=high", "--nodes=4", "--output=/dev/null", "--wrap", "sleep 1")
        cluster.wait(number, "PENDING", "RUNNING", restarts=1)
        saved = max(event["step"] for event in run.each_event() if event["event"] == "checkpoint")
        wait_for_step(run, saved + 60, cluster, number)

        at_work = cluster.run("scontrol", "show", "hostnames", cluster.job(number)["NodeList"]).split()
        batch_host = cluster.job(number)["BatchHost"]
        lost = next(host for host in cluster.nodes if host.name in at_work and host.name != batch_host)
        lost.kill()
        cluster.wait(number, "PENDING", "RUNNING", restarts=2)
        cluster.wait(number, "COMPLETED", restarts=2, timeout_seconds=180)
    events = list(run.each_event())
    resumed = [event["step"] for event in events if event["event"] == "recovery"]
    assert resumed[0] == saved and resumed[1] > saved  # what is left of the nodes goes on until Slurm ends the job
    losses = {event["step"]: event["loss"] for event in run.steps()}
    alone = {event["step"]: event["loss"] for event in RunFolder(undisturbed["run"]).steps()}
    assert list(losses) == list(alone) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(alone, rel=1e-5)
