"""One launcher under one fault, on hosts of this machine: how soon steps go on, and what the past still commits."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.launch.faults import COORDINATOR, Fault
from bench.launch.steps import COMMITS, STEPS, Line, read_lines
from bench.launch.systems import Command, System, environment
from tests.hosts import hosts

#: Steps that all hosts make before the fault, and the seconds they are given for it.
STEPS_BEFORE, START_SECONDS = 10, 120.0
#: How long steps may take to go on, and then to be made by three hosts again.
LIMIT_SECONDS = 60.0
#: What is mended is mended so long after the fault, and a host that comes back is watched for commits of its past.
AWAY_SECONDS, WATCH_SECONDS = 15.0, 15.0
STRANGER = "host-5"


@dataclass(frozen=True)
class Outcome:
    """Seconds from the fault to the first step of a new process group (None: not within LIMIT_SECONDS), and the hosts
    in it; from mending (from the fault where nothing is mended) to the first step of three hosts; how often a group
    from before the fault committed after a new one had; whether the old group stood still and went on when all was
    mended; and the committed steps that were made again."""

    again_seconds: float | None
    again_world: int
    whole_seconds: float | None
    stale_commits: int
    stood_still: bool
    lost_steps: int


class Trial:
    """A launcher at work on hosts."""

    def __init__(self, system: System, hosts: Sequence[Any], folder: Path) -> None:
        self.system, self.folder = system, folder
        self._hosts = {host.name: host for host in hosts}
        self.stopped = ""

    def host(self, name: str) -> Any:
        return self._hosts[name]

    def start(self, name: str) -> None:
        """Starts what the host `name` runs."""
        host, coordinator = self.host(name), self.host(COORDINATOR)
        if name == COORDINATOR:
            command = self.system.service(self.folder, coordinator.address)
        else:
            command = self.system.agent(self.folder, name, host.address, coordinator.address)
        if command is not None:
            self.start_command(name, command)

    def start_command(self, name: str, command: Command) -> None:
        """Starts a command on the host `name`, with its output in that host's log."""
        host = self.host(name)
        with open(self.folder / f"{host.name}.log", "ab") as log:
            host.start(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(command, host.interface),
            )

    def begin(self, hosts: int) -> None:
        """Starts the coordinator and the first `hosts` hosts, and waits until these train."""
        self.start(COORDINATOR)
        for number in range(1, hosts + 1):
            self.start(f"host-{number}")
        if self.first(lambda line: line.world == hosts and line.step >= STEPS_BEFORE, START_SECONDS) is None:
            raise RuntimeError(f"no step {STEPS_BEFORE} of {hosts} hosts in {START_SECONDS:g} s: {self.folder}/*.log")

    def first(self, fits: Callable[[Line], bool], seconds: float) -> Line | None:
        """The first step that fits, for which it is waited so long."""
        found: list[Line] = []

        def look() -> bool:
            found[:] = [line for line in self.lines(STEPS) if fits(line)][:1]
            return bool(found)

        return found[0] if wait_for(look, seconds) else None

    def rank_pid(self, host: str) -> int:
        return [line.pid for line in self.lines(STEPS) if line.host == host][-1]

    def saver(self) -> str:
        return self.lines(COMMITS)[-1].host

    def lines(self, name: str) -> list[Line]:
        return read_lines(self.folder, name)


def measure(trial: Trial, fault: Fault) -> Outcome:
    """Runs until all hosts train, strikes, mends and watches. Raises RuntimeError if training never starts."""
    trial.begin(fault.before)
    last = trial.lines(COMMITS)[-1].step
    for seconds, strike in fault.strikes:
        time.sleep(seconds)
        struck = time.time()
        strike(trial)
    again = trial.first(lambda line: line.group > struck, LIMIT_SECONDS)
    mended = struck
    if fault.mend is not None:
        time.sleep(max(0.0, struck + AWAY_SECONDS - time.time()))
        mended = time.time()
        fault.mend(trial)
    whole = trial.first(lambda line: line.group > struck and line.world == 3 and line.at > mended, LIMIT_SECONDS)
    if fault.mend is not None:
        time.sleep(max(0.0, mended + WATCH_SECONDS - time.time()))
    stale = [] if again is None else [one for one in trial.lines(COMMITS) if one.group < struck and one.at > again.at]
    return Outcome(
        None if again is None else again.at - struck,
        0 if again is None else again.world,
        None if whole is None else whole.at - mended,
        len(stale),
        again is None and any(line.group < struck and line.at > mended > struck for line in trial.lines(STEPS)),
        0 if again is None else max(0, last + 1 - again.step),
    )


def wait_for(happened: Callable[[], bool], seconds: float) -> bool:
    """Whether it happens within so many seconds."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def trials(system: System, out: Path, name: str) -> Iterator[Trial]:
    """Five hosts and nothing on them yet: three that train, one that coordinates, one that a stranger has. Their logs
    are in a folder of `out`."""
    with hosts(5) as made:
        yield Trial(system, made, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=out)))
