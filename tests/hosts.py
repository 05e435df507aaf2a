"""Hosts of a test: network namespaces of this machine, joined by a bridge, each with a name and an address of its own.

A host sees the disk of this machine and its own network, host name, `/etc/hosts` (which names every host of the group)
and `/dev/shm`; nothing outside the group can be reached. What runs there is ended when the `with` block ends, and where
the test process itself is killed too: each host has a keeper that waits for its pipe to close. Names of namespaces that
a dead process has left are deleted by the next group.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PREFIX = "meshwright"
NAMED = Path("/run/netns")
COMMANDS = ("ip", "tc", "nsenter", "unshare", "mount", "hostname")
#: For processes to be gone after a signal: far more than it takes.
PATIENCE_SECONDS = 20.0
_serials = itertools.count()

#: The first process of a host. It sets up what is inside, and ends all others when its owner is gone.
KEEPER = r"""
set -e
hostname "$NAME"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
printf '%s' "$HOSTS" > /dev/shm/.hosts
mount --bind /dev/shm/.hosts /etc/hosts
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
echo ready
read -r nothing || :
for round in 1 2 3 4 5 6 7 8 9 10; do
  for pid in $(ip netns pids "$NAMESPACE"); do [ "$pid" = $$ ] || kill -KILL "$pid" 2> /dev/null || :; done
done
"""


class Host:
    """One host. `name` is its host name, `address` its IPv4 address on `interface`, the only one beside `lo`."""

    interface = "eth0"

    def __init__(self, name: str, address: str, namespace: str, switch: str) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self._switch = switch  # the namespace of the bridge, where this host's cable ends in a port of its own name
        self._keeper: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[Any]] = []

    def start(self, command: Sequence[str], cwd: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """A command inside the host, in a session of its own, with subprocess.Popen's options. Its pid is its own."""
        assert self._keeper is not None
        options.setdefault("start_new_session", True)
        entering = ["nsenter", "-t", str(self._keeper.pid), "-n", "-m", "-u", f"--wdns={cwd or os.getcwd()}", "--"]
        process = subprocess.Popen([*entering, *map(str, command)], **options)
        self._started.append(process)
        return process

    def run(self, command: Sequence[str], timeout_seconds: float = 60.0, **options: Any) -> Any:
        """The CompletedProcess of a command inside the host, with its output as text."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        with self.start(command, text=True, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout_seconds)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def cut(self) -> None:
        """Pulls the cable out: no more packet comes or goes, and no connection is told of it."""
        _ip("-n", self._switch, "link", "set", self.name, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _ip("-n", self._switch, "link", "set", self.name, "up")

    def limit(self, megabits: float | None) -> None:
        """The most that the cable carries in a second, each way; None: as fast as it can."""
        for namespace, device in ((self._switch, self.name), (self.namespace, self.interface)):
            if megabits is None:
                _command("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
            else:
                burst_bytes = max(64 * 1024, int(megabits * 1e6 / 8 / 250))  # what passes in a tick of a slow kernel
                shape = ["tbf", "rate", f"{megabits}mbit", "burst", f"{burst_bytes}b", "latency", "50ms"]
                _command("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape)

    def hide(self, folder: str | os.PathLike[str]) -> None:
        """Puts an empty disk of this host's own over a folder, which the other hosts go on sharing."""
        done = self.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(folder)])
        assert done.returncode == 0, done.stderr

    def processes(self) -> list[int]:
        """The pids of all that runs here, but for the keeper."""
        assert self._keeper is not None
        started = {process.pid for process in self._started if process.poll() is None}
        return sorted((started | _inside(NAMED / self.namespace)) - {self._keeper.pid})

    def kill(self) -> None:
        """A power cut: no process of this host is left. Others can be started afterwards."""
        self._until(signal.SIGKILL, lambda: not self.processes())

    def stop(self) -> None:
        """Holds every process of this host still (SIGSTOP)."""
        # D: it waits in the kernel, perhaps for a child that is held before its exec, and is held when it returns
        self._until(signal.SIGSTOP, lambda: all(_state(pid) in "TtZXD" for pid in self.processes()))

    def go_on(self) -> None:
        """What `stop` held runs again."""
        self._until(signal.SIGCONT, lambda: all(_state(pid) not in "Tt" for pid in self.processes()))

    def _until(self, number: signal.Signals, done: Callable[[], bool]) -> None:
        """Signals every process, those too that are forked meanwhile."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if done():
                return
            assert time.monotonic() < deadline, f"{self.name}: {self.processes()} are not what {number.name} makes them"
            time.sleep(0.01)

    def _open(self, hosts: Mapping[str, str]) -> None:
        _ip("netns", "add", self.namespace)
        _ip(
            "-n",
            self._switch,
            "link",
            "add",
            self.name,
            "type",
            "veth",
            "peer",
            self.interface,
            "netns",
            self.namespace,
        )
        _ip("-n", self._switch, "link", "set", self.name, "master", "switch", "up")
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts.items())]
        self._keeper = subprocess.Popen(
            ["nsenter", f"--net={NAMED / self.namespace}", "unshare", "-m", "-u", "sh", "-c", KEEPER],
            env={
                "PATH": os.environ["PATH"],
                "NAME": self.name,
                "ADDRESS": self.address,
                "NAMESPACE": self.namespace,
                "HOSTS": "\n".join(lines) + "\n",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _wait_until_open(self) -> None:
        assert self._keeper is not None and self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ready\n", f"{self.name}: cannot be set up; its message is above"

    def _close(self) -> None:
        if self._keeper is not None:
            try:
                self.kill()
            finally:
                self._keeper.kill()
                self._keeper.communicate()


@contextlib.contextmanager
def hosts(count: int) -> Iterator[tuple[Host, ...]]:
    """As many hosts, `host-1` and on, that reach each other by name and address. Skips where they cannot be made."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"network namespaces need {'root' if not missing else ' and '.join(missing)}")
    _sweep()
    group = f"{PREFIX}-{os.getpid()}-{_started_at(os.getpid())}-{next(_serials)}"
    switch = f"{group}-switch"
    try:
        _ip("netns", "add", switch)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
    subnet = f"10.{random.randint(0, 255)}.{random.randint(0, 255)}"
    addresses = {f"host-{number}": f"{subnet}.{number}" for number in range(1, count + 1)}
    made = tuple(Host(name, address, f"{group}-{name}", switch) for name, address in addresses.items())
    try:
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for host in made:
            host._open(addresses)
        for host in made:
            host._wait_until_open()
        yield made
    finally:
        with contextlib.ExitStack() as closing:
            for name in _of(group):
                closing.callback(_ip, "netns", "delete", name)
            for host in made:
                closing.callback(host._close)


def _sweep() -> None:
    """Ends and deletes what test processes that are dead have left."""
    for name in _of(PREFIX):
        _, pid, started_at, *_ = name.split("-")
        if _started_at(int(pid)) != started_at:
            for one in _inside(NAMED / name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            # another test process may sweep at the same time
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


def _of(group: str) -> list[str]:
    return [path.name for path in NAMED.glob(f"{group}-*")]


def _inside(namespace: Path) -> set[int]:
    """The processes whose network namespace it is; a dead one that nobody has waited for has none."""
    try:
        inode = namespace.stat().st_ino
    except FileNotFoundError:
        return set()
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            if path.stat().st_ino == inode:
                found.add(int(path.parts[2]))
    return found


def _state(pid: int) -> str:
    return (_stat(pid) or ["X"])[0]


def _started_at(pid: int) -> str:
    """When a process was started, in ticks of its machine: with the pid a name that is never used twice; "" if gone."""
    return (_stat(pid) or [""] * 20)[19]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _ip(*words: str) -> None:
    _command("ip", *words)


def _command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
