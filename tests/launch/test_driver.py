"""A driver that is killed, and what becomes of its agents and ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshwright.launch.access import AGENTS, read_dial
from tests.launch.agents import PATHS, alive, eventually


def start(folder: Path, patience_seconds: float) -> subprocess.Popen[str]:
    command = f"from tests.launch.agents import drive; drive({str(folder)!r}, {patience_seconds})"
    environment = {**os.environ, "PYTHONPATH": PATHS}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", command], env=environment, stdout=pipe, stderr=pipe, text=True)


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
