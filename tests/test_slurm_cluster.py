"""The Slurm that tests run on: it starts, places a task on each node, and preempts, requeues and loses nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import Slurm, slurm

pytestmark = pytest.mark.slow

#: One task on each node notes every start in a file; SIGTERM ends it after AFTER, or never.
JOB = """#!/bin/bash
#SBATCH --nodes=2 --exclusive --requeue --open-mode=append
srun --ntasks-per-node=1 bash -c '
  trap "echo told >> {notes}; {on_term}" TERM
  echo begun $SLURM_PROCID on $HOSTNAME, restart ${{SLURM_RESTART_COUNT:-0}} >> {notes}
  while true; do sleep 0.1; done' &
trap 'ended=1' TERM
while kill -0 $! 2> /dev/null; do wait $!; done
{after}
"""
REQUEUE = '[ -n "$ended" ] || scontrol requeue $SLURM_JOB_ID'


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    def write(on_term: str, after: str = "") -> Path:
        file = tmp_path / "job.sh"
        file.write_text(JOB.format(notes=tmp_path / "notes", on_term=on_term, after=after))
        return file

    return write


def begun(folder: Path, restart: int) -> list[str]:
    lines = (folder / "notes").read_text().splitlines()
    return sorted(line.split()[3].rstrip(",") for line in lines if line.endswith(f"restart {restart}"))


def preempt(cluster: Slurm, folder: Path) -> str:
    file = folder / "urgent.sh"
    file.write_text("#!/bin/bash\nsleep 1\n")
    return cluster.submit(file, "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null")


def running(cluster: Slurm, folder: Path, number: str, restart: int) -> list[str]:
    """The nodes on which both tasks of a job have begun."""
    cluster.wait(number, "RUNNING", restarts=restart)
    while not (folder / "notes").exists() or len(begun(folder, restart)) < 2:
        assert cluster.job(number)["JobState"] == "RUNNING"
    return begun(folder, restart)


def test_a_task_runs_on_each_node(tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm") as cluster:
        names = [host.name for host in cluster.nodes]
        assert sorted(cluster.run("srun", "--nodes=3", "--ntasks-per-node=1", "hostname").split()) == names
        assert cluster.states() == dict.fromkeys(names, "idle")
        hosts = (cluster.controller, *cluster.nodes)
    assert [host.processes() for host in hosts] == [[], [], [], []]


def test_preemption_tells_the_tasks_and_a_job_that_requeues_itself_begins_again(
    tmp_path: Path, script: Callable[..., Path]
) -> None:
    with slurm(tmp_path / "slurm") as cluster:
        number = cluster.submit(script("exit 0", after=REQUEUE), f"--output={tmp_path / 'out'}")
        running(cluster, tmp_path, number, restart=0)
        urgent = preempt(cluster, tmp_path)
        cluster.wait(urgent, "RUNNING", "COMPLETED")
        running(cluster, tmp_path, number, restart=1)
        assert (tmp_path / "notes").read_text().count("told") == 2
        # what is cancelled stays so, though its script queues again what was preempted
        cluster.run("scancel", number)
        cluster.wait(number, "CANCELLED", restarts=1)


def test_a_job_that_exits_within_its_grace_is_not_queued_again_by_slurm(
    tmp_path: Path, script: Callable[..., Path]
) -> None:
    with slurm(tmp_path / "slurm") as cluster:
        number = cluster.submit(script("exit 0"), f"--output={tmp_path / 'out'}")
        running(cluster, tmp_path, number, restart=0)
        preempt(cluster, tmp_path)
        cluster.wait(number, "COMPLETED")
        assert cluster.job(number)["Restarts"] == "0"


def test_a_lost_node_is_known_and_its_job_begins_again_on_others(tmp_path: Path, script: Callable[..., Path]) -> None:
    with slurm(tmp_path / "slurm") as cluster:
        number = cluster.submit(script(":"), f"--output={tmp_path / 'out'}")
        first = running(cluster, tmp_path, number, restart=0)
        lost = next(host for host in cluster.nodes if host.name == first[0])
        lost.kill()
        cluster.wait_for_node(lost, "down*")
        assert lost.name not in running(cluster, tmp_path, number, restart=1)
        cluster.run("scancel", number)
        cluster.start_node(lost)
        cluster.wait_for_node(lost, "idle")
