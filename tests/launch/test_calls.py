"""What a driver and its ranks say to each other, and how ranks end, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright import env, launch
from meshwright.errors import RunFailed
from meshwright.launch import LocalBackend, RankGroup
from meshwright.launch.groups import Node, Place
from meshwright.launch.hub import Hub
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.messages import Failure, Message, first
from meshwright.launch.wire import hub_pb2 as wire

WORKERS = "tests.launch.workers:"


def failure(kind: str, message: str, seconds: float, rank: int = 0) -> Failure:
    return Failure("rank", rank, "a", 1, kind, message, seconds)


def test_calls_are_answered_with_bodies_and_blobs(tmp_path: Path) -> None:
    with launch.local(WORKERS + "answer_calls", {}, 2, tmp_path) as started:
        blob = bytes(range(256)) * 4096
        asked = {started.call("rank", rank, "give back", {"x": rank}, blob): rank for rank in (0, 1, 1)}
        assert len(asked) == 3
        for _ in range(3):
            answer = started.call_result(30)
            assert answer.rank == asked.pop(answer.id)
            assert answer.body == {"got": {"x": answer.rank}, "rank": answer.rank}
            assert answer.blob == blob[::-1]
            assert not answer.error
        started.call("rank", 0, "fail")
        assert started.call_result(30).error == "cannot"
        with pytest.raises(TimeoutError, match=r"no rank has answered within 0\.01 s"):
            started.call_result(0.01)
        with pytest.raises(ValueError, match="more than the"):
            started.call("rank", 0, "give back", None, bytes(64 << 20))
        for rank in (0, 1):
            started.call("rank", rank, "return")
        assert started.wait(30) == ["returned", "returned"]
        assert {started.call_result(10).error for _ in range(2)} == {"the rank has returned"}


@pytest.mark.parametrize(("rank", "role"), [(0, "rank"), (7, "rank"), (0, "nobody")])
def test_who_does_not_run_answers_with_an_error(tmp_path: Path, rank: int, role: str) -> None:
    started = launch.local(WORKERS + "where", {}, 1, tmp_path)
    started.wait(30)
    started.call(role, rank, "give back")
    assert started.hub.event(10).error == "the rank does not run"  # type: ignore[union-attr]


def test_a_rank_that_ends_with_a_call_open_answers_with_its_end(tmp_path: Path) -> None:
    with launch.local(WORKERS + "answer_calls", {}, 2, tmp_path) as started:
        calls = [started.call("rank", 1, "never answered"), started.call("rank", 1, "leave")]
        results = [started.call_result(30) for _ in calls]
        assert [result.id for result in results] == calls
        assert {result.error for result in results} == {"ended with exit code 3 and left no result"}
        with pytest.raises(RunFailed, match="rank 1 of 2: ended with exit code 3"):
            started.wait(30)


def test_what_is_told_arrives_in_order_before_the_result(tmp_path: Path) -> None:
    said: list[Message] = []
    group = RankGroup("rank", WORKERS + "tell", {"count": 300, "blob": 1000}, 2)
    launch.start(LocalBackend(2), [group], tmp_path, on_message=said.append).wait(60)
    for rank in (0, 1):
        mine = [one for one in said if one.rank == rank]
        assert [one.body["number"] for one in mine] == list(range(300))
        assert [one.blob for one in mine] == [number.to_bytes(2, "big") * 1000 for number in range(300)]
        assert {one.kind for one in mine} == {"number"}


def test_more_than_a_message_holds_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"ValueError: what is told has 681574\d\d bytes, more than the"):
        launch.local(WORKERS + "tell_much", {}, 1, tmp_path).wait(60)


@pytest.mark.slow
def test_a_rank_that_is_held_has_failed(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="rank 1 of 2: was held by SIGSTOP for 5 s"):
        launch.local(WORKERS + "hold", {}, 2, tmp_path).wait(60)


def test_a_rank_for_which_memory_lacks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tmp_path / "groups"
    groups.mkdir()
    (groups / "own").write_text("0::/\n")
    (groups / "memory.events").write_text("low 0\noom_kill 0\n")
    monkeypatch.setattr(env, "CGROUPS", groups)
    monkeypatch.setattr(env, "OWN_CGROUPS", groups / "own")
    payload = {"events": str(groups / "memory.events")}
    asked: list[Any] = []
    group = RankGroup("rank", WORKERS + "use_up_memory", payload, 1)

    def ask(event: Any, _: Any) -> Any:
        asked.append(event)
        return [group] if event is None else None

    with pytest.raises(RunFailed, match="the memory of its control group is used up"):
        launch.keep(LocalBackend(1), ask, tmp_path / "logs").wait(60)
    assert asked[-1].kind == "memory"


def test_the_first_cause_is_named_and_not_what_followed(tmp_path: Path) -> None:
    """The others lose their connection, and say so earlier or later."""
    with pytest.raises(RunFailed, match=r"rank 1 of 3: ValueError: the true cause"):
        launch.local(WORKERS + "sum_until", {}, 3, tmp_path).wait(120)


def test_the_order_of_causes() -> None:
    closed = failure("error", "RuntimeError: [gloo/pair.cc:1] Connection closed by peer [10.0.0.1]:9", 1.0, 0)
    raised = failure("error", "ValueError: x", 3.0, 1)
    killed = failure("signal", "was killed by SIGKILL", 2.0, 2)
    silent = failure("silent", "its node b has not been heard of for 5 s", 9.0, 3)
    earlier = failure("error", "KeyError: y", 2.5, 4)
    assert first([closed, raised]) is raised
    assert first([closed, raised, killed]) is killed
    assert first([closed, silent, raised]) is silent
    assert first([closed, raised, earlier]) is earlier
    assert closed.consequence and not raised.consequence and not killed.consequence


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a rank on each of the nodes a and b, as it takes them over from one that was killed."""
    files = HubFiles(None, [])
    places = [Place("rank", rank, node, 0, 0) for rank, node in enumerate("ab")]
    files.hub.adopt(1, places, [Node("a"), Node("b")], {"a": "ticket of a", "b": "ticket of b"})
    yield files.hub
    files.close()


def events(hub: Hub) -> list[Any]:
    return list(iter(lambda: hub.event(0), None))


def test_what_arrives_twice_is_taken_once(hub: Hub) -> None:
    name = wire.RankName(role="rank", rank=0)
    for number in (1, 1, 2, 1, 2, 3):
        hub.told(wire.Told(name=name, kind="n", body=str(number).encode(), number=number))
    assert [event.body for event in events(hub)] == [1, 2, 3]
    call = hub.call("rank", 0, "name")
    for _ in range(2):
        hub.answered(wire.CallAnswer(name=name, id=call, body=b"1"))
    hub.answered(wire.CallAnswer(name=wire.RankName(role="rank", rank=1), id=hub.call("rank", 0, "name"), body=b"1"))
    assert [event.id for event in events(hub)] == [call]  # nor does another rank answer for it


def test_a_rank_that_listens_anew_gets_the_calls_that_have_not_arrived(hub: Hub) -> None:
    name = wire.RankName(role="rank", rank=0)
    calls = [hub.call("rank", 0, word) for word in ("before", "it", "listens")]
    assert calls == sorted(set(calls))
    first = hub.calls_of(name, 0)
    assert first is not None
    assert [first.get(timeout=1).id for _ in calls] == calls  # type: ignore[union-attr]
    again = hub.calls_of(name, calls[0])
    assert again is not None
    assert first.get(timeout=1) is None
    later = hub.call("rank", 0, "later")
    assert [again.get(timeout=1).id for _ in range(3)] == [*calls[1:], later]  # type: ignore[union-attr]
    assert first.empty() and again.empty()
    assert hub.calls_of(wire.RankName(role="rank", rank=9), 0) is None


def test_an_agent_speaks_for_the_ranks_of_its_own_node_alone(hub: Hub) -> None:
    member = hub._members["a"]
    for rank in (1, 0):
        name = wire.RankName(role="rank", rank=rank)
        hub.hear(member, wire.AgentMessage(log=wire.Log(name=name, text=b"words")))
        hub.hear(member, wire.AgentMessage(ended=wire.RankEnded(name=name, generation=1, result=b"1")))
    assert [(type(event).__name__, event.rank) for event in events(hub)] == [("Message", 0), ("Returned", 0)]
    hub.hear(member, wire.AgentMessage(ended=wire.RankEnded(name=name, generation=0, result=b"1")))
    assert events(hub) == [] and hub.running() == [("rank", 1)]
