"""What a person reads: a plan on one screen, a run as it goes, what doctor found."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from meshwright.cluster import Cluster, named_cluster
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import Plan, PlanRequest, make_plan
from meshwright.report import terminal
from meshwright.run import RunFolder

SHAPE = LlamaShape(layers=6, hidden=256, heads=8, kv_heads=4, head_dim=32, ffn=512, vocab=1024)


def plan(devices: int = 4, **pins: int) -> Plan:
    cluster: Cluster = named_cluster("a100-sxm-80gb", devices)
    return make_plan(card(SHAPE, 128), cluster, PlanRequest(32, pins=pins))


def console() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False, force_terminal=False)


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize(("devices", "pins"), [(1, {}), (4, {}), (8, {"pp": 8}), (64, {"pp": 8})])
def test_a_plan_is_one_screen(devices: int, pins: dict[str, int]) -> None:
    screen = console()
    terminal.show_plan(plan(devices, **pins), screen)
    lines = text_of(screen).splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 80 for line in lines)


def test_a_plan_says_what_was_decided_and_why() -> None:
    screen, planned = console(), plan(4, pp=2)
    terminal.show_plan(planned, screen)
    text = text_of(screen)
    for word in ("FITS", str(planned.chosen.layout), "90 %", "tokens/s", "why", "weights", "activations", "pipeline"):
        assert word in text
    for choice in planned.runners_up:
        assert choice.why.split()[0] in text


def test_bars_are_as_long_as_their_share() -> None:
    assert terminal._cells([50, 25, 25], 100, 40) == [20, 10, 10]
    assert sum(terminal._cells([1, 1, 1], 3, 10)) == 10
    assert sum(terminal._cells([1, 1], 4, 10)) == 5


def test_of_many_stages_the_ends_and_the_fullest_are_shown() -> None:
    assert terminal.shown_stages([1, 2, 3]) == [0, 1, 2]
    totals = [5] * 20
    totals[9] = 9
    assert terminal.shown_stages(totals) == [0, 1, None, 9, None, 18, 19]


def write_run(folder: RunFolder) -> None:
    folder.append_event("start", step=0, steps=40)
    for step in range(1, 11):
        folder.append_event(
            "step", step=step, loss=3.5, tokens_per_second=1234.0, step_seconds=2.0, predicted_step_seconds=1.5
        )
    folder.append_event("eval", step=10, held_out_loss=3.25, bits_per_byte=2.5)
    folder.append_event("checkpoint", step=10, seconds=0.1)


def test_the_live_line_says_where_a_run_is() -> None:
    progress = terminal.Progress()
    assert progress.line("tokens") == "starting"
    progress.update({"event": "start", "step": 0, "steps": 40})
    step = {"event": "step", "step": 10, "loss": 3.5, "tokens_per_second": 1234.0, "step_seconds": 2.0}
    progress.update({**step, "predicted_step_seconds": 1.5})
    assert progress.update({"event": "upload", "step": 10, "url": "s3://bucket/x", "bytes": 1}) == "step 10: uploaded"
    assert progress.update({"event": "upload", "step": 10, "error": "no answer"}) is None  # which a warning tells
    remark = progress.update({"event": "eval", "step": 10, "held_out_loss": 3.25})
    assert remark == "step 10: held out: loss 3.25"
    line = progress.line("tokens")
    for words in ("step 10/40", "loss 3.5000", "held out loss 3.25", "1,234 tokens/s", "2 s/step (predicted 1.5)"):
        assert words in line
    assert line.endswith("1 min 00 s left")


class AfterOneLook:
    """Says that a run has ended when it is asked a second time; the first time it writes the run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self.calls = folder, 0

    def __call__(self) -> bool:
        if not self.calls:
            write_run(self._folder)
        self.calls += 1
        return self.calls > 1


def test_without_a_terminal_lines_are_few_and_plain(tmp_path: Path) -> None:
    folder, screen = RunFolder(tmp_path), console()
    terminal.live(folder, plan(), AfterOneLook(folder), screen)
    lines = text_of(screen).splitlines()
    assert sum(line.startswith("step 1/40") for line in lines) == 1
    assert len(lines) == 3  # the first step, the measurement, the checkpoint
    assert "\x1b" not in text_of(screen)


def test_a_run_is_followed_to_its_end_where_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")  # noqa: SIM115 - closing it fails, as the pipe is broken
    monkeypatch.setattr(sys, "stderr", stream)
    until = AfterOneLook(folder)
    terminal.live(folder, plan(), until)
    assert until.calls == 2
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_in_a_terminal_the_line_stays_in_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    screen = Console(file=io.StringIO(), width=100, force_terminal=True)
    terminal.live(folder, plan(), AfterOneLook(folder), screen)
    assert "step 10/40" in text_of(screen)


def test_durations_and_counts_are_short() -> None:
    assert [terminal.duration(s) for s in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]
    assert [terminal.count(n) for n in (12, 2_360_000, 406e9)] == ["12", "2.36 M", "406 B"]


def test_doctor_says_what_is_there_and_what_is_wrong() -> None:
    found = {
        "meshwright": "0.1",
        "python": {"version": "3.11", "executable": "python"},
        "platform": "Linux",
        "packages": {"torch": "2.13", "ray": None},
        "cpu": {"name": "CPU [x]", "cores": 2, "load": 0.1, "instructions": ["avx2"], "slow_bf16": True},
        "memory": {"total_bytes": 8 * 2**30, "available_bytes": None},
        "cluster": "2 x CPU core",
        "disk": {"here": {"path": "/", "free_bytes": 2**30}},
        "speeds": {
            "products": [{"device": "cpu", "precision": "fp32", "threads": 1, "flops_per_second": 80e9}],
            "memory_read_bytes_per_second": {"1": 30e9},
            "links": [
                {
                    "collective": "all_reduce",
                    "backend": "gloo",
                    "processes": 2,
                    "bytes_per_second": 1e9,
                    "latency_seconds": 4e-4,
                }
            ],
            "disk_write_bytes_per_second": 5e8,
        },
        "sockets": [
            {
                "what": "HTTP",
                "opened_by": "serve",
                "address": "127.0.0.1",
                "port": "8000",
                "state": "free",
                "authenticated": "",
                "note": "not encrypted",
            }
        ],
        "problems": [{"where": "torch", "what": "too old", "nearest": "2.11"}],
    }
    screen = console()
    terminal.show_doctor(found, screen)
    text = text_of(screen)
    for words in ("CPU [x]", "slow at bf16", "80 GFLOP/s", "30.0 GB/s", "unauthenticated", "torch: too old; 2.11"):
        assert words in text
    assert "torch 2.13" in text and "ray" not in text
