"""A hub with agents that reach it over TCP and TLS, as those of many machines do: nodes come, go, and fail."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from meshwright import launch
from meshwright.errors import CannotWork, RunFailed
from meshwright.launch import Finished, Node, RankGroup
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.messages import Message
from tests.launch.agents import ROOT, AgentProcesses, alive, eventually
from tests.launch.proxy import Proxy

WORKERS = "tests.launch.workers:"


class OnAll:
    """Wants a rank on every device of the nodes there are, until all have returned without being asked."""

    def __init__(self, function: str, folder: Path, least: int) -> None:
        self._function, self._folder, self._least = WORKERS + function, folder, least
        self.events: list[Any] = []

    def __call__(self, event: Any, nodes: Sequence[Node]) -> Any:
        self.events.append(event)
        if isinstance(event, Finished) and not any(isinstance(one, dict) and one["asked"] for one in event.results):
            return None
        count = sum(node.devices for node in nodes if node.leaving_seconds is None)
        if count < self._least:
            return launch.Wait(30.0)
        return [RankGroup("rank", self._function, {"folder": str(self._folder)}, count)]


class BehindAProxy(AgentProcesses):
    """Agents whose connections to the hub can be broken."""

    proxy: Proxy

    def open(self, files: HubFiles) -> None:
        super().open(files)
        self.proxy = Proxy(self.hub_address)
        self.address = self.proxy.address


def pids(folder: Path, generation: int, count: int) -> list[int]:
    """The processes of a generation, once all have begun."""
    paths = [folder / f"pid-{generation}-{rank}" for rank in range(count)]
    assert eventually(lambda: all(path.exists() and path.read_text() for path in paths)), paths
    return [int(path.read_text()) for path in paths]


def test_nodes_join_leave_and_are_lost(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1})
    ask = OnAll("until_asked", tmp_path, 1)
    with launch.keep(cluster, ask, tmp_path / "logs") as run:
        pids(tmp_path, 1, 2)
        cluster.start("c", 2)  # grows
        three = pids(tmp_path, 2, 4)
        assert [(tmp_path / f"saved-1-{rank}").exists() for rank in range(2)] == [True, True]
        cluster.take_away("b", signal.SIGTERM)  # shrinks: the node's time is up
        four = pids(tmp_path, 3, 3)
        assert all((tmp_path / f"saved-2-{rank}").exists() for rank in range(4))
        assert cluster.processes["b"].wait(20) == 0
        cluster.take_away("c", signal.SIGKILL)  # shrinks: a power cut
        assert eventually(lambda: not any(alive(pid) for pid in four[1:]), 5)  # ranks end with their agent
        pids(tmp_path, 4, 1)
        assert (tmp_path / "saved-3-0").exists()
        (tmp_path / "end").touch()
        assert [result["generation"] for result in run.wait(30)] == [4]
        names = [type(event).__name__ for event in ask.events]
        assert names[0] == "NoneType" and names[-1] == "Finished"
        assert {"NodeJoined", "NodeLeaving", "Failure"} <= set(names)
        failure = next(event for event in ask.events if type(event).__name__ == "Failure")
        assert failure.kind == "unreachable" and failure.node == "c"
        assert not any(alive(pid) for pid in three)
    assert [cluster.processes[name].returncode for name in ("a", "c")] == [0, -signal.SIGKILL]


@pytest.mark.slow
def test_two_faults_within_three_seconds(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1, "c": 1})
    with launch.keep(cluster, OnAll("until_asked", tmp_path, 1), tmp_path / "logs") as run:
        first = pids(tmp_path, 1, 3)
        os.kill(first[0], signal.SIGKILL)  # a rank of a
        cluster.take_away("b", signal.SIGKILL)
        time.sleep(1.0)
        cluster.take_away("c", signal.SIGKILL)
        assert eventually(lambda: any(tmp_path.glob("pid-*-0")) and len(run.hub.nodes()) == 1)
        assert eventually(lambda: run.hub.generation > 1 and len(run.hub.running()) == 1)
        (tmp_path / "end").touch()
        assert len(run.wait(30)) == 1


def test_a_connection_that_breaks_for_a_moment_changes_nothing(tmp_path: Path) -> None:
    """No word of a rank is lost or comes twice, keys and calls go on, and no rank is started anew."""
    said: list[Message] = []
    cluster = BehindAProxy(tmp_path, {"a": 1})
    group = RankGroup("rank", WORKERS + "tell_while_called", {}, 1)
    with launch.start(cluster, [group], tmp_path / "logs", on_message=said.append) as run, cluster.proxy as proxy:
        before = run.pids
        kept = [run.call("rank", 0, "keep", word) for word in "ab"]
        for round_ in range(2):
            assert eventually(lambda: len(said) > 20)
            heard = len(said)
            proxy.cut()
            call = run.call("rank", 0, "give back", round_)
            time.sleep(1.0)
            proxy.mend()
            answer = run.call_result(20)
            assert (answer.id, answer.body, answer.error) == (call, round_, "")
            assert eventually(lambda heard=heard: len(said) > heard + 20)  # type: ignore[misc]
        assert run.pids == before and run.hub.generation == 1
        run.call("rank", 0, "kept")
        assert run.call_result(20).body == ["a", "b"]  # each has come once
        run.call("rank", 0, "return")
        (count,) = run.wait(30)
        ends = {result.id: result.error for result in (run.call_result(10) for _ in range(3)) if result.error}
        assert ends == dict.fromkeys(kept, "the rank has returned")
    assert [message.body for message in said] == list(range(1, count + 1))


def test_near_ranks_and_the_most_of_a_node_are_kept_to(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 3, "b": 3})
    group = RankGroup("rank", WORKERS + "where", {}, 4, near=2, most_per_node=2)
    found = launch.start(cluster, [group], tmp_path / "logs").wait(60)
    assert [one[:2] for one in found] == [[0, 0], [1, 1], [0, 0], [1, 1]]
    agents = [one[2] for one in found]
    assert agents[0] == agents[1] == cluster.processes["a"].pid
    assert agents[2] == agents[3] == cluster.processes["b"].pid


def test_groups_that_cannot_be_placed_are_answered_at_once(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1, "c": 1})
    group = RankGroup("rank", WORKERS + "where", {}, 5, most_per_node=1)
    begun = time.monotonic()
    with pytest.raises(CannotWork) as raised:
        launch.start(cluster, [group], tmp_path / "logs")
    assert time.monotonic() - begun < 2.0
    for words in ("role rank", "5 ranks, a cpu device each", "3 nodes: a (1 cpu devices", "nearest: 3 ranks"):
        assert words in str(raised.value)


def test_a_node_with_other_code_is_refused_by_name(tmp_path: Path) -> None:
    package = tmp_path / "other" / "meshwright"
    shutil.copytree(ROOT / "src" / "meshwright", package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(package / "divisors.py", "a") as file:
        file.write("# another line\n")
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1})
    cluster.paths["b"] = os.pathsep.join([str(package.parent), str(ROOT)])
    group = RankGroup("rank", WORKERS + "where", {}, 2)
    words = r"node b: the code of meshwright is [0-9a-f]{12} there and [0-9a-f]{12} at the driver"
    with pytest.raises(CannotWork, match=words):
        launch.start(cluster, [group], tmp_path / "logs")
    assert cluster.processes["b"].returncode == 3
    assert re.search(words, cluster.log("b").read_text())


def test_a_node_that_goes_while_groups_are_thought_about_is_asked_about_again(tmp_path: Path) -> None:
    """To think takes a planner seconds."""
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1})
    asked: list[Any] = []

    def ask(event: Any, nodes: Sequence[Node]) -> Any:
        asked.append(event)
        if isinstance(event, Finished):
            return None
        group = RankGroup("rank", WORKERS + "where", {}, len(nodes))
        if len(asked) == 1:
            del cluster.devices["b"]
        return [group]

    assert len(launch.keep(cluster, ask, tmp_path / "logs").wait(60)) == 1
    assert [type(event).__name__ for event in asked] == ["NoneType", "NodeLost", "Finished"]
    assert "b" not in cluster.processes


def test_the_only_node_ends_and_its_ranks_save(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 2})
    group = RankGroup("rank", WORKERS + "until_asked", {"folder": str(tmp_path)}, 2)
    with launch.start(cluster, [group], tmp_path / "logs") as run:
        pids(tmp_path, 1, 2)
        cluster.processes["a"].send_signal(signal.SIGTERM)
        assert [result["asked"] for result in run.wait(30)] == [True, True]


def test_where_a_spare_takes_over_the_same_groups_go_on(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1})
    group = RankGroup("rank", WORKERS + "until_asked", {"folder": str(tmp_path)}, 1)
    asked: list[Any] = []

    def ask(event: Any, nodes: Sequence[Node]) -> Any:
        asked.append(event)
        return None if isinstance(event, Finished) else [group]

    with launch.keep(cluster, ask, tmp_path / "logs") as run:
        pids(tmp_path, 1, 1)
        cluster.start("b")
        cluster.take_away("a", signal.SIGTERM)
        pids(tmp_path, 2, 1)
        assert run.hub.generation == 2 and (tmp_path / "saved-1-0").exists()
        (rank,) = run.hub.status().ranks
        assert rank.node == "b"


def test_a_lack_after_a_loss_ends_the_job_and_the_rest_in_order(tmp_path: Path) -> None:
    """What cannot work any more is a failure of the run, which can be resumed, and no bad input."""
    cluster = AgentProcesses(tmp_path, {"a": 1, "b": 1})

    def ask(event: Any, nodes: Sequence[Node]) -> Any:
        return [RankGroup("rank", WORKERS + "until_asked", {"folder": str(tmp_path)}, 2 if event is None else 3)]

    with launch.keep(cluster, ask, tmp_path / "logs") as run:
        pids(tmp_path, 1, 2)
        cluster.take_away("b", signal.SIGTERM)
        with pytest.raises(RunFailed, match=r"asks for 3 ranks.*nearest: 1 ranks"):
            run.wait(30)
    assert all((tmp_path / f"saved-1-{rank}").exists() for rank in range(2))


def test_an_error_of_the_driver_itself_has_ranks_end_in_order(tmp_path: Path) -> None:
    cluster = AgentProcesses(tmp_path, {"a": 1})

    def take(message: Message) -> None:
        raise OSError(28, "No space left on device", "events.jsonl")

    groups = [
        RankGroup("rank", WORKERS + "until_asked", {"folder": str(tmp_path)}, 1, need=launch.Need(devices=0)),
        RankGroup(
            "teller", WORKERS + "tell", {"count": 1, "after": str(tmp_path / "pid-1-0")}, 1, need=launch.Need(devices=0)
        ),
    ]
    run = launch.start(cluster, groups, tmp_path / "logs", on_message=take)
    with pytest.raises(OSError, match=r"No space left on device: 'events\.jsonl'"):
        run.wait(30)
    assert run.poll() == "failed"
    assert (tmp_path / "saved-1-0").exists()


def without(run: Path) -> list[str]:
    """The begin of the command of an agent that does not see the folder `run`, which is made."""
    run.mkdir()
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("a disk of the node's own needs the right to mount one")
    hidden = f"mount -t tmpfs tmpfs {shlex.quote(str(run))}"
    return ["unshare", "-m", "sh", "-c", hidden + ' && exec "$@"', "sh"]


def test_logs_of_a_node_that_does_not_share_the_disk_come_to_the_driver_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = AgentProcesses(tmp_path, {"a": 1})
    cluster.before = without(run)
    ask = OnAll("print_until_asked", tmp_path, 1)
    with launch.keep(cluster, ask, run / "logs", hub_folder=run / "hub") as at_work:
        pids(tmp_path, 1, 1)
        cluster.start("b")
        pids(tmp_path, 2, 2)
        (tmp_path / "end").touch()
        at_work.wait(30)
    logs = {path.name: path.read_text().splitlines() for path in (run / "logs").iterdir()}
    ends = {number: [f"{word} of generation {number}" for word in ("begin", "end")] for number in (1, 2)}
    assert logs == {"rank-0.log": [*ends[1], *ends[2]], "rank-1.log": ends[2]}


def test_such_logs_are_whole_and_a_leaving_node_is_heard_after_the_connection_broke(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = BehindAProxy(tmp_path, {"a": 1})
    cluster.before = without(run)
    group = RankGroup("rank", WORKERS + "print_lines_until_asked", {"folder": str(tmp_path)}, 1)
    events: list[Any] = []

    def ask(event: Any, _: Sequence[Node]) -> list[RankGroup] | None:
        events.append(event)
        return [group] if event is None else None

    with launch.keep(cluster, ask, run / "logs", hub_folder=run / "hub") as at_work, cluster.proxy as proxy:
        log = run / "logs" / "rank-0.log"

        def lines() -> int:
            return len(log.read_text().splitlines()) if log.exists() else 0

        for _ in range(2):
            heard = lines()
            assert eventually(lambda heard=heard: lines() > heard + 10)  # type: ignore[misc]
            proxy.cut()
            time.sleep(2.0)
            proxy.mend()
        proxy.cut()
        cluster.take_away("a", signal.SIGTERM)  # it is told while the connection is broken, and so is the rank's end
        assert eventually((tmp_path / "printed").exists)
        time.sleep(0.5)
        proxy.mend()
        at_work.wait(30)
    assert "NodeLeaving" in [type(event).__name__ for event in events]
    assert log.read_text().splitlines() == [f"line {n}" for n in range(int((tmp_path / "printed").read_text()))]
