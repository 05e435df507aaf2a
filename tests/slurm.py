"""A real Slurm on hosts of a test: one that runs its controller, and nodes. All that it writes is in one folder.

The programs are Debian's munge, slurmctld, slurmd and slurm-client, which `tests/services.sh` installs; no service of
the machine is started or read. The nodes share the disk of this machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
#: Far more than anything here takes, on a machine that is full of other tests.
PATIENCE_SECONDS = 180.0

#: The spool is on the host's own /dev/shm: sockets lie in it, whose paths are short.
#: Jobs of partition `low`, the default one, give way to those of `high`: they have GraceTime, and are queued again.
#: cred_expire is also how long a job that is queued again waits (120 s where not set, 5 at least), and a node that
#: does not answer for SlurmdTimeout is lost: both short, as tests wait for them.
CONFIGURATION = """
ClusterName=meshwright
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=/dev/shm/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir=/dev/shm/slurmd-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
MessageTimeout=3
TCPTimeout=1
SlurmctldTimeout=10
SlurmdTimeout=3
HealthCheckInterval=0
InactiveLimit=0
UnkillableStepTimeout=60
ReturnToService=2
NodeName={nodes} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_seconds}
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A cluster at work. `controller` is the host where its commands are run, `nodes` those that jobs run on."""

    def __init__(self, controller: Host, nodes: Sequence[Host], folder: Path) -> None:
        self.controller = controller
        self.nodes = tuple(nodes)
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration)}

    def run(self, *command: str, timeout_seconds: float = 60.0, **options: Any) -> str:
        """What a command (sbatch, srun, scontrol, ...) prints on the controller's host; it must end with 0."""
        options.setdefault("env", self.environment)
        done = self.controller.run(command, timeout_seconds, **options)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stderr}{self.logs()}"
        return str(done.stdout)

    def submit(self, script: Path, *options: str) -> str:
        """The number of the job that sbatch makes of a script."""
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, Restarts, BatchHost, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return {key: value for key, separator, value in (word.partition("=") for word in words) if separator}

    def wait(self, number: str, *states: str, restarts: int = 0, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Returns once the job is in one of the states and has been queued again at least that often."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = self.job(number)
            if found["JobState"] in states and int(found["Restarts"]) >= restarts:
                return
            assert time.monotonic() < deadline, f"job {number} is not {states} but {found}\n{self.logs()}"
            time.sleep(0.1)

    def states(self) -> dict[str, str]:
        """Each node's state in one word, with a `*` where it does not answer."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_for_node(self, host: Host, *states: str, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + timeout_seconds
        while self.states().get(host.name) not in states:
            assert time.monotonic() < deadline, f"{host.name} is not {states}: {self.states()}\n{self.logs()}"
            time.sleep(0.1)

    def start_node(self, host: Host) -> None:
        """Starts what a node runs; also again, after its host was killed."""
        self._munge(host)
        self._daemon(host, "slurmd", "-D", "-f", str(self.configuration), "-N", host.name)

    def logs(self) -> str:
        """The last lines of what the daemons have written."""
        return "".join(
            f"\n--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self) -> None:
        self._munge(self.controller)
        self._daemon(self.controller, "slurmctld", "-D", "-i", "-f", str(self.configuration))
        for host in self.nodes:
            self.start_node(host)
        deadline = time.monotonic() + PATIENCE_SECONDS
        ready = dict.fromkeys((host.name for host in self.nodes), "idle")
        while self._states_if_answering() != ready:
            assert time.monotonic() < deadline, f"Slurm does not start{self.logs()}"
            time.sleep(0.1)

    def _states_if_answering(self) -> dict[str, str]:
        command = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T"]
        done = self.controller.run(command, env=self.environment)
        return dict(line.split() for line in done.stdout.splitlines())

    def _munge(self, host: Host) -> None:
        """The socket lies in the host's own /dev/shm, under one name for all, as the configuration is one for all."""
        own = self.folder / f"munge-{host.name}"
        files = [f"--{kind}-file={own}.{kind}" for kind in ("log", "pid", "seed")]
        key = f"--key-file={self.folder / 'munge.key'}"
        self._daemon(
            host, "munged", "--foreground", "--force", "--num-threads=1", "--socket=/dev/shm/munge.socket", key, *files
        )
        socket_deadline = time.monotonic() + PATIENCE_SECONDS
        while host.run(["test", "-S", "/dev/shm/munge.socket"]).returncode != 0:
            assert time.monotonic() < socket_deadline, f"munged does not start on {host.name}{self.logs()}"
            time.sleep(0.02)

    def _daemon(self, host: Host, *command: str) -> None:
        with (self.folder / f"{command[0]}-{host.name}.out.log").open("ab") as log:
            host.start(command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextlib.contextmanager
def slurm(folder: Path, nodes: int = 3, cpus: int = 2, grace_seconds: int = 10) -> Iterator[Slurm]:
    """Slurm with that many nodes of that many CPUs, ready for jobs; all ended afterwards. Skips where it is missing.

    `grace_seconds` is what a preempted job of partition `low` has before it is ended; Slurm looks every 5 s or so.
    """
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing); tests/services.sh installs it")
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(64))
    with hosts(nodes + 1) as (controller, *others):
        cluster = Slurm(controller, others, folder)
        cluster.configuration.write_text(
            CONFIGURATION.format(
                controller=controller.name,
                folder=folder,
                nodes=",".join(host.name for host in others),
                cpus=cpus,
                grace_seconds=grace_seconds,
            )
        )
        cluster._start()
        yield cluster
