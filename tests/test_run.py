from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.run import RunFolder


def test_paths_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "a")
    assert not run.path.exists() and run.read_events() == []
    names = ["job.toml", "plan.json", "events.jsonl", "manifest", "checkpoints", "logs", "trace.json", "report.html"]
    paths = [run.job, run.plan, run.events, run.manifest, run.checkpoints, run.logs, run.trace, run.report]
    assert [path.relative_to(run.path).as_posix() for path in paths] == names
    run.write_job("[model]\n")
    run.write_plan({"chosen": {"layout": {"dp": 2}}})
    assert run.job.read_text() == "[model]\n"
    assert json.loads(run.plan.read_text())["chosen"]["layout"] == {"dp": 2}


def test_one_process_at_a_time_holds_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    hold = "import sys; from meshwright.run import RunFolder\nwith RunFolder(sys.argv[1]).lock(): print(); input()"
    arguments = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        with pytest.raises(InputError, match=f"process {holder.pid} on .* is at work in it; wait"), run.lock():
            pass
        holder.kill()  # the kernel releases what a dead process held
        holder.wait()
    with run.lock():
        pass


def test_events_come_back_as_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_event("start", layout="dp2", world=2)
    run.append_event("step", step=1, loss=2.5)
    start, step = run.read_events()
    assert (start["event"], start["layout"], start["world"]) == ("start", "dp2", 2)
    assert (step["event"], step["step"], step["loss"]) == ("step", 1, 2.5)
    assert step["time"] >= start["time"]


def test_events_are_strict_json_even_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_event("step", step=1, loss=math.nan, grad_norm=math.inf, seconds=0.5)

    def refuse(word: str) -> float:
        raise AssertionError(word)

    line = json.loads(run.events.read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["not_finite"] == {"loss": "nan", "grad_norm": "inf"}
    (event,) = run.read_events()
    assert math.isnan(event["loss"]) and event["grad_norm"] == math.inf and event["seconds"] == 0.5
    assert "not_finite" not in event


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: start, step"):
        RunFolder(tmp_path).append_event("stepp")


@given(cut=st.integers(min_value=0, max_value=10_000))
def test_any_torn_end_costs_only_its_own_line(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    for step in range(3):
        run.append_event("step", step=step, loss=1.0)
    whole = run.events.read_bytes()
    cut %= len(whole) + 1
    run.events.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert [event["step"] for event in run.read_events()] == list(range(kept))
    run.append_event("recovery", step=kept)
    events = run.read_events()
    # The tear may have taken the newline alone; then the line itself is whole and counts again.
    assert len(events) - kept in (1, 2)
    assert events[-1]["event"] == "recovery" and [event["step"] for event in events[:kept]] == list(range(kept))


def test_hostile_lines_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    run.append_event("step", step=1)
    hostile = [
        b"\xff\xfe",
        b"[1]",
        b"7",
        b'{"event": 3}',
        b'{"event": "step"}',
        b'{"event":"end","not_finite":[1]}',
        b"",
    ]
    with open(run.events, "ab") as file:
        file.write(b"\n".join(hostile) + b"\n")
    run.append_event("end")
    with caplog.at_level(logging.WARNING, logger="meshwright"):
        assert [event["event"] for event in run.read_events()] == ["step", "end"]
    assert len(caplog.records) == 6


def test_a_step_done_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)]:
        run.append_event("step", step=step, loss=loss)
    run.append_event("eval", step=3, loss=9.0)
    assert [(event["step"], event["loss"]) for event in run.steps()] == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_tail_gives_every_line_once_and_ends_after_the_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    over = threading.Event()

    def write() -> None:
        for step in range(50):
            run.append_event("step", step=step)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert [event["step"] for event in run.tail(over.is_set, poll_seconds=0.001)] == list(range(50))
    writer.join()


def test_tail_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_event("start")
    with open(run.events, "ab") as file:
        file.write(b'{"event":"st')
    answers = iter([False, True])
    seen = []
    for event in run.tail(lambda: next(answers), poll_seconds=0):
        seen.append(event["event"])
        with open(run.events, "ab") as file:
            file.write(b'ep","step":1}\n' if len(seen) == 1 else b"")
    assert seen == ["start", "step"]


def test_tail_from_the_end_leaves_out_the_past(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_event("start")
    events = run.tail(lambda: True, from_end=True)
    run.append_event("end")
    assert [event["event"] for event in events] == ["end"]
