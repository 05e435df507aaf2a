"""A driver that is killed, and what becomes of its agents and ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshwright.launch import RankGroup
from meshwright.launch.access import AGENTS, read_dial, write_private
from meshwright.launch.groups import Place
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.people import hub_status
from tests.launch.agents import PATHS, alive, eventually


def start(folder: Path, patience_seconds: float, files: int = 0) -> subprocess.Popen[str]:
    """files: how many it may have open, until it asks for more."""
    command = f"from tests.launch.agents import drive; drive({str(folder)!r}, {patience_seconds})"
    environment = {**os.environ, "PYTHONPATH": PATHS}
    limited = ["sh", "-c", f'ulimit -Sn {files} && exec "$@"', "sh"] if files else []
    words, pipe = [*limited, sys.executable, "-c", command], subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)


def kill(driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGKILL)
    driver.communicate()


def numbers(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()]


def test_a_killed_drivers_agents_and_ranks_end(tmp_path: Path) -> None:
    driver = start(tmp_path, 0.0)
    assert eventually((tmp_path / "started").exists)
    agents, ranks = numbers(tmp_path / "agents"), numbers(tmp_path / "ranks")
    assert len(agents) == len(ranks) == 2 and all(map(alive, agents + ranks))
    kill(driver)
    assert eventually(lambda: not any(map(alive, agents + ranks)), 10.0)
    assert len(list(tmp_path.glob("saved-1-*"))) == 2  # they were asked first


@pytest.mark.parametrize("away_seconds", [0.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_a_driver_that_is_started_again_takes_over_what_lives(tmp_path: Path, away_seconds: float) -> None:
    driver = start(tmp_path, 60.0)
    assert eventually((tmp_path / "started").exists)
    agents, ranks = numbers(tmp_path / "agents"), numbers(tmp_path / "ranks")
    kill(driver)
    time.sleep(away_seconds)  # longer than agents wait for a driver that is not detached
    assert all(map(alive, agents + ranks))
    again = start(tmp_path, 60.0)
    try:
        assert eventually((tmp_path / "adopted").exists), again.communicate()
        assert numbers(tmp_path / "ranks") == ranks and all(map(alive, agents + ranks))
        host, _, port = read_dial(tmp_path / "hub" / AGENTS).address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as stranger:
            stranger.sendall(b"no words of TLS, which gRPC would tell the driver's terminal")
            stranger.recv(1)
        (tmp_path / "end").touch()
        out, err = again.communicate(timeout=30)
    finally:
        again.kill()
    assert [result["pid"] for result in json.loads(out)] == ranks, err
    assert [result["generation"] for result in json.loads(out)] == [1, 1]
    assert not err
    assert eventually(lambda: not any(map(alive, agents + ranks)), 10.0)
    assert not (tmp_path / "hub").exists()


def test_what_returned_while_the_driver_was_away_is_not_lost(tmp_path: Path) -> None:
    driver = start(tmp_path, 60.0)
    assert eventually((tmp_path / "started").exists)
    ranks = numbers(tmp_path / "ranks")
    kill(driver)
    (tmp_path / "end").touch()
    assert eventually(lambda: not any(map(alive, ranks)), 10.0)
    again = start(tmp_path, 60.0)
    out, err = again.communicate(timeout=30)
    assert [result["pid"] for result in json.loads(out)] == ranks, err


def test_an_agent_that_looks_for_a_hub_ends_when_its_node_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "meshwright.launch.agent", "--run", str(tmp_path / "run")]
    agent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PATHS}, stderr=subprocess.PIPE, text=True)
    try:
        handled = 1 << (signal.SIGTERM - 1)
        status = Path(f"/proc/{agent.pid}/status")
        assert eventually(lambda: int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & handled)
        agent.terminate()
        assert agent.wait(10) == 0
    finally:
        agent.kill()
        agent.communicate()


def test_more_strangers_than_files_that_it_may_open_by_itself_do_not_disturb_it(tmp_path: Path) -> None:
    driver = start(tmp_path, 0.0, files=128)
    try:
        assert eventually((tmp_path / "started").exists), driver.communicate()
        host, _, port = read_dial(tmp_path / "hub" / AGENTS).address.rpartition(":")
        with contextlib.ExitStack() as strangers:
            for _ in range(400):
                strangers.enter_context(socket.create_connection((host, int(port)), 10))
            status = hub_status(tmp_path / "hub")
            assert status is not None and len(status.nodes) == 2
            (tmp_path / "end").touch()
            out, err = driver.communicate(timeout=30)
    finally:
        driver.kill()
    assert len(json.loads(out)) == 2
    assert not err


def test_a_hub_whose_addresses_are_taken_is_no_hindrance_to_the_next(tmp_path: Path) -> None:
    """A driver was killed, and another program listens where it did: the run is started anew and not taken over."""
    hub = tmp_path / "hub"
    before = HubFiles(hub, ["127.0.0.1:0"])
    group = RankGroup("rank", "m:f", {}, 1)
    before.begin(5, [group], [Place("rank", 0, "a", 0, 0)], tmp_path)
    kept = {path.name: path.read_bytes() for path in hub.iterdir()}
    before.close()
    address = json.loads(kept["hub.json"])["addresses"][1]
    host, _, port = address.rpartition(":")
    hub.mkdir()
    for name, content in kept.items():
        (hub / name).write_bytes(content)
        (hub / name).chmod(0o600)
    after = HubFiles(hub, ["127.0.0.1:0"])
    assert after.before is not None and after.hub.generation == 5  # it knows from the first moment
    assert after.network is not None and after.network.address == address
    after.close()
    for name, content in kept.items():
        hub.mkdir(exist_ok=True)
        (hub / name).write_bytes(content)
        (hub / name).chmod(0o600)
    with socket.create_server((host, int(port))):
        third = HubFiles(hub, ["127.0.0.1:0"])
        assert third.before is None and third.hub.generation == 0
        assert third.network is not None and third.network.address != address
        third.close()


@pytest.mark.parametrize(("host", "interface"), [("no-such-host.invalid", None), ("192.0.2.1", "lo")])
def test_a_hub_that_cannot_be_reached_yet_is_waited_for(tmp_path: Path, host: str, interface: str | None) -> None:
    """As while a cluster's names come up: 4 says that no hub was found, 2 would say that none can be."""
    access = tmp_path / "agents.json"
    write_private(access, {"address": f"{host}:1", "secret": "none", "certificate": "none"})
    options = ["--access", str(access), "--wait", "1", "--patience", "1"]
    agent = run_agent(*options, *(["--interface", interface] if interface else []))
    assert agent.returncode == 4, agent.stderr
    assert interface or f"{host} cannot be reached" in agent.stderr


def test_an_access_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    agent = run_agent("--access", str(tmp_path / "none"))
    assert agent.returncode == 2 and f"{tmp_path}/none: cannot be read: No such file" in agent.stderr
    assert "Traceback" not in agent.stderr


def run_agent(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright.launch.agent", *options]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=60)
