"""The table of sockets, and what is said about a bad place to listen."""

from __future__ import annotations

import socket

import pytest

from meshwright.job.sections import LaunchSection, ServeSection
from meshwright.probe import sockets


@pytest.fixture()
def busy_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def test_the_table_has_every_listener_and_says_which_ask_for_nothing() -> None:
    rows = sockets.listeners(ServeSection(http_port=0, grpc_port=0), LaunchSection())
    assert [row.opened_by for row in rows][:2] == ["serve", "serve"]
    assert {row.address for row in rows} == {
        "127.0.0.1",
        "lo (127.0.0.1)",
        "a Unix socket",
        "set by launch.address",
    }
    assert [bool(row.authenticated) for row in rows] == [False, False, False, True, True]
    with_token = sockets.listeners(ServeSection(http_port=0, grpc_port=0, token_file="key"), LaunchSection())
    assert [row.authenticated for row in with_token][:2] == ["bearer token of key"] * 2


@pytest.mark.parametrize("on", ["ray", "agents"])
def test_on_several_nodes_ranks_talk_over_what_leads_to_the_hub_or_what_the_job_names(on: str) -> None:
    def address(launch: LaunchSection) -> str:
        rows = sockets.listeners(ServeSection(http_port=0, grpc_port=0), launch)
        return next(row.address for row in rows if row.what.startswith("gloo"))

    assert address(LaunchSection(on=on)) == "each node's interface towards the hub"
    assert address(LaunchSection(on=on, interface="eth7")) == "eth7 (no address)"


def test_a_port_in_use_is_a_problem(busy_port: int) -> None:
    problems = sockets.socket_problems(ServeSection(http_port=busy_port, grpc_port=0), LaunchSection())
    assert [problem.where for problem in problems] == ["serve.http_port"]
    assert problems[0].nearest == "serve.http_port=0 takes any free port"


def test_listening_beyond_this_machine_without_a_token_is_a_problem() -> None:
    open_to_all = ServeSection(host="0.0.0.0", http_port=0, grpc_port=0)
    assert [p.where for p in sockets.socket_problems(open_to_all, LaunchSection())] == ["serve.host"]
    guarded = ServeSection(host="0.0.0.0", http_port=0, grpc_port=0, token_file="key")
    assert sockets.socket_problems(guarded, LaunchSection()) == []


def test_a_missing_interface_names_those_there_are() -> None:
    (problem,) = sockets.socket_problems(ServeSection(http_port=0, grpc_port=0), LaunchSection(interface="nosuch0"))
    assert "lo" in problem.nearest


def test_a_public_interface_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "interface_address", lambda name: "8.8.8.8")
    (problem,) = sockets.socket_problems(ServeSection(http_port=0, grpc_port=0), LaunchSection())
    assert "public address 8.8.8.8" in problem.what
