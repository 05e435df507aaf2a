"""The hosts that tests of clusters run on: they are apart, joined by cables, and leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import hosts as subject
from tests.hosts import Host, hosts

#: Sends a number of bytes to whoever connects first, and prints the seconds that it took.
SENDER = """
import socket, sys, time
listener = socket.create_server(("", 0))
print(listener.getsockname()[1], flush=True)
taker, _ = listener.accept()
begun = time.monotonic()
taker.sendall(bytes(int(sys.argv[1])))
taker.shutdown(socket.SHUT_WR)
taker.recv(1)
print(time.monotonic() - begun, flush=True)
"""
TAKER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sender:
    while sender.recv(1 << 20):
        pass
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Host, Host]]:
    with hosts(2) as (a, b):
        yield a, b


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reaches(host: Host, other: Host, within_seconds: float = 10.0) -> bool:
    script = "import socket, sys; socket.create_connection((sys.argv[1], 4000), float(sys.argv[2]))"
    listener = other.start(
        [sys.executable, "-c", "import socket; s = socket.create_server(('', 4000)); print(1, flush=True); s.accept()"],
        stdout=subprocess.PIPE,
    )
    listener.stdout.read(1)
    try:
        return host.run([sys.executable, "-c", script, other.name, str(within_seconds)]).returncode == 0
    finally:
        other.kill()
        listener.communicate()


def seconds_of(sender: Host, taker: Host, size_bytes: int) -> float:
    process = sender.start([sys.executable, "-c", SENDER, str(size_bytes)], stdout=subprocess.PIPE, text=True)
    port = process.stdout.readline().strip()
    done = taker.run([sys.executable, "-c", TAKER, sender.address, port])
    assert done.returncode == 0, done.stderr
    return float(process.communicate()[0])


def test_each_has_a_name_and_an_address_of_its_own(pair: tuple[Host, Host]) -> None:
    said = [host.run(["hostname"]).stdout.strip() for host in pair]
    assert said == [host.name for host in pair] == ["host-1", "host-2"]
    for host in pair:
        shown = host.run(["ip", "-4", "-br", "address"]).stdout.split()
        assert [word for word in shown if "/" in word] == ["127.0.0.1/8", f"{host.address}/24"]
    assert pair[0].address != pair[1].address
    assert subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip() not in said


def test_a_started_process_has_its_folder_and_its_environment(pair: tuple[Host, Host], tmp_path: Path) -> None:
    done = pair[0].run(["sh", "-c", "pwd; echo $WORD"], cwd=tmp_path, env={**os.environ, "WORD": "given"})
    assert done.stdout.split() == [str(tmp_path), "given"]


def test_control_groups_are_seen(pair: tuple[Host, Host]) -> None:
    assert pair[0].run(["ls", "/sys/fs/cgroup"]).stdout.split() == sorted(os.listdir("/sys/fs/cgroup"))


def test_a_cut_cable_passes_nothing_until_it_is_mended(pair: tuple[Host, Host]) -> None:
    a, b = pair
    assert reaches(a, b)
    assert reaches(b, a)
    b.cut()
    assert not reaches(a, b, within_seconds=0.5)
    assert not reaches(b, a, within_seconds=0.5)
    b.mend()
    assert reaches(a, b)


def test_a_limit_slows_both_ways_and_is_taken_away(pair: tuple[Host, Host]) -> None:
    a, b = pair
    size_bytes = 2_000_000
    b.limit(megabits=40)  # 0.4 s
    limited = [seconds_of(a, b, size_bytes), seconds_of(b, a, size_bytes)]
    b.limit(megabits=None)
    free = [seconds_of(a, b, size_bytes), seconds_of(b, a, size_bytes)]
    assert min(limited) > 2 * max(free)


def test_a_killed_host_is_empty_and_starts_again(pair: tuple[Host, Host]) -> None:
    a, b = pair
    other = b.start(["sleep", "60"])
    # the grandchild has left its session and its parent
    process = a.start(["sh", "-c", "setsid setsid sleep 60 & exec sleep 60"])
    wait_until(lambda: len(a.processes()) == 2)
    a.kill()
    assert a.processes() == []
    assert process.wait() == -signal.SIGKILL
    assert other.poll() is None
    assert a.run(["hostname"]).stdout.strip() == a.name
    b.kill()


def test_a_stopped_host_is_still_until_it_goes_on(pair: tuple[Host, Host], tmp_path: Path) -> None:
    host = pair[0]
    file = tmp_path / "grows"
    host.start(["sh", "-c", f"while true; do echo >> {file}; sleep 0.01; done"])
    wait_until(file.exists)
    host.stop()
    before = file.stat().st_size
    time.sleep(0.1)
    assert file.stat().st_size == before
    host.go_on()
    wait_until(lambda: file.stat().st_size > before)
    host.kill()


def test_a_hidden_folder_is_this_hosts_own(pair: tuple[Host, Host], tmp_path: Path) -> None:
    (tmp_path / "shared").touch()
    pair[0].hide(tmp_path)
    assert pair[0].run(["ls", str(tmp_path)]).stdout == ""
    assert pair[1].run(["ls", str(tmp_path)]).stdout == "shared\n"


def test_shared_memory_is_not_shared_between_hosts(pair: tuple[Host, Host]) -> None:
    assert pair[0].run(["touch", "/dev/shm/planted"]).returncode == 0
    assert pair[1].run(["ls", "/dev/shm"]).stdout == ""
    assert not Path("/dev/shm/planted").exists()


def test_nothing_is_left_even_after_an_error() -> None:
    links = os.listdir("/sys/class/net")
    with pytest.raises(ZeroDivisionError), hosts(1) as (host,):
        process = host.start(["sh", "-c", "trap '' TERM; while true; do sleep 1; done"])
        namespace = subject.NAMED / host.namespace
        assert namespace.exists()
        1 / 0
    assert process.poll() == -signal.SIGKILL
    assert not namespace.exists()
    assert os.listdir("/sys/class/net") == links


def test_a_killed_owner_leaves_no_process_and_names_only_for_the_next() -> None:
    script = (
        "from tests.hosts import hosts\n"
        "with hosts(1) as (host,):\n"
        "    print(host.namespace, host.start(['sleep', '60']).pid, flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    namespace, pid = owner.stdout.readline().split()
    wait_until(lambda: int(pid) in subject._inside(subject.NAMED / namespace))
    assert (subject.NAMED / namespace).exists()
    owner.kill()
    owner.communicate()
    wait_until(lambda: not subject._inside(subject.NAMED / namespace))
    assert subject._state(int(pid)) in "ZX"
    with hosts(1):
        assert not (subject.NAMED / namespace).exists()
