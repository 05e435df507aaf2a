"""What a driver and its ranks say to each other, and how ranks end, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshwright import env, launch
from meshwright.errors import RunFailed
from meshwright.launch import LocalBackend, RankGroup
from meshwright.launch.messages import Failure, Message, first

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
