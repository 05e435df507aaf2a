"""A cluster on this machine for the tests of `launch`: each node's agent is a process of its own, which reaches the hub
over TCP and TLS, as those of many machines do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwright.launch import Node
from meshwright.launch.access import write_private
from meshwright.launch.hub_files import HubFiles

ROOT = Path(__file__).parents[2]
#: What agents and ranks import: the package under test, and the functions of the tests.
PATHS = os.pathsep.join([str(ROOT / "src"), str(ROOT)])


class AgentProcesses:
    """A ClusterBackend of the nodes `devices`, name -> number of devices; more may be added, some taken away."""

    def __init__(self, folder: Path, devices: Mapping[str, int], *options: str, listen: str = "127.0.0.1:0") -> None:
        """folder: for the file by which agents find the hub, and for their logs; options: of every agent."""
        self._folder, self._options, self._listen = folder, options, listen
        self.devices = dict(devices)
        self.paths: dict[str, str] = {}  # node -> its PYTHONPATH, where it is another
        self.address = ""  # "": the hub's own, else that of a proxy before it
        self.access = folder / "agents.json"  # by which agents find the hub
        self.before: list[str] = []  # the begin of the command of every agent
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def open(self, files: HubFiles) -> None:
        dial = files.network
        assert dial is not None
        self.hub_address = dial.address
        record = {"address": dial.address, "secret": dial.secret, "certificate": dial.certificate}
        if not self.access.exists():
            write_private(self.access, record)

    def listen(self) -> Sequence[str]:
        return (self._listen,)

    def nodes(self, attending: Sequence[Node]) -> Sequence[Node]:
        known = {node.name: node for node in attending}
        return [known.get(name, Node(name, devices=count)) for name, count in self.devices.items()]

    def agents(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.processes or self.processes[name].poll() is not None:
                self.start(name)

    def close(self) -> None:
        for process in self.processes.values():
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
                process.terminate()  # one that has not reached the hub would look for it
                process.wait(10)
            finally:
                process.kill()

    # What tests do to it

    def start(self, name: str, devices: int | None = None) -> None:
        """Starts the agent of a node, as its cluster would, or a person."""
        self.devices.setdefault(name, devices or 1)
        command = [*self.before, sys.executable, "-m", "meshwright.launch.agent", "--access", str(self.access)]
        command += ["--node", name, "--devices", str(self.devices[name]), *self._options]
        command += ["--hub", self.address] if self.address else []
        environment = {**os.environ, "PYTHONPATH": self.paths.get(name, PATHS), "OMP_NUM_THREADS": "1"}
        with open(self.log(name), "ab") as log:
            self.processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def take_away(self, name: str, number: signal.Signals) -> None:
        """Signals the agent of a node that its cluster no longer has."""
        del self.devices[name]
        self.processes[name].send_signal(number)

    def log(self, name: str) -> Path:
        return self._folder / f"agent-{name}.log"


def eventually(true: Callable[[], Any], seconds: float = 60) -> Any:
    """What `true` returns once it is true; the last it returned where that takes too long."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def drive(folder: str, patience_seconds: float) -> None:
    """A driver as a process of its own: two ranks on nodes a and b; leaves the pids of agents and ranks, then the
    results. Started again in the same folder after it was killed, it takes over what lives."""
    from meshwright import launch

    path = Path(folder)
    cluster = AgentProcesses(path, {"a": 1, "b": 1}, "--wait", "1")
    group = launch.RankGroup("rank", "tests.launch.workers:until_asked", {"folder": folder}, 2)
    adopted: list[Any] = []
    run = launch.start(
        cluster,
        [group],
        path / "logs",
        hub_folder=path / "hub",
        patience_seconds=patience_seconds,
        on_adopt=adopted.append,
    )
    (path / "agents").write_text(" ".join(str(process.pid) for process in cluster.processes.values()))
    (path / "ranks").write_text(" ".join(map(str, run.pids)))
    (path / ("adopted" if adopted else "started")).touch()
    print(json.dumps(run.wait()))
