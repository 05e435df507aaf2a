"""The timeline as text, as SVG and as a Chrome trace."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from meshwright.layout import Layout
from meshwright.plan.pipeline.actions import actions
from meshwright.plan.pipeline.replay import replay
from meshwright.report.timeline import chrome_trace, text_rows, timeline_svg
from meshwright.run import RunFolder
from meshwright.train.spans import Spans
from tests.report.plans import choice

TIMELINE = replay(actions("1f1b", 2, 2), [1.0, 1.0], [2.0, 2.0])
SVG = "{http://www.w3.org/2000/svg}"
LAYOUTS = [
    (Layout(pp=4), 8),
    (Layout(pp=4, schedule="interleaved", vpp=2), 8),
    (Layout(pp=4, schedule="zb-h1"), 8),
    (Layout(pp=2, schedule="zbv", vpp=2), 6),
    (Layout(pp=2, schedule="dualpipev", vpp=2), 5),
]


def test_text_shows_each_stage_in_time() -> None:
    # 1F1B, two stages, two micro-batches: 9 seconds, one forward of a stage idle on either side.
    rows = text_rows(TIMELINE, width=90)
    assert [len(row) for row in rows] == [90, 90]
    assert rows[0].startswith("0" * 10 + "1" * 10) and rows[1].startswith("." * 10 + "0" * 10 + "a" * 20)
    assert rows[0].endswith("b" * 20)


def test_text_has_a_row_a_rank_and_marks_weights_gradients() -> None:
    rows = text_rows(replay(actions("zbv", 2, 2, 2), [1.0] * 4, [2.0] * 4, weight_seconds=[1.0] * 4))
    assert len(rows) == 2 and all("+" in row for row in rows)


@pytest.mark.parametrize(("layout", "micro"), LAYOUTS)
def test_svg_has_every_action_where_the_replay_has_it(layout: Layout, micro: int) -> None:
    made = choice(layout, micro)
    timeline = made.timeline()
    root = xml.fromstring(timeline_svg(made))
    bars = [
        bar
        for bar in root.iter(f"{SVG}rect")
        if "a" in bar.get("class", "").split() and bar.find(f"{SVG}title") is not None
    ]
    assert len(bars) == len(timeline.events)
    lanes = sorted({float(bar.get("y", "")) for bar in bars})
    assert len(lanes) == layout.pp
    right = max(float(bar.get("x", "")) + float(bar.get("width", "")) for bar in bars)
    width = float(root.get("viewBox", "").split()[2])
    assert right <= width
    # no two bars of a lane overlap
    for lane in lanes:
        row = sorted((float(b.get("x", "")), float(b.get("width", ""))) for b in bars if float(b.get("y", "")) == lane)
        assert all(x + w <= next_x + 0.02 for (x, w), (next_x, _) in itertools.pairwise(row))
    words = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert f"{100 * timeline.bubble:.1f} % of it idle" in words and "forward" in words
    assert ("weight gradients" in words) == any(event.kind == "W" for event in timeline.events)


def test_svg_stands_alone_in_light_and_dark() -> None:
    text = timeline_svg(choice(Layout(pp=2), 4))
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in text and "url(" not in text


def test_svg_of_a_large_pipeline_shows_a_part_and_says_so() -> None:
    text = timeline_svg(choice(Layout(pp=64), 512, layers=126))
    assert "the first 16 micro-batches alone" in text and "of the whole step 20.0 %" in text
    assert "stage 0<" in text and "stage 63<" in text and "…" in text and "stage 31<" not in text
    assert len(text) < 400_000


def test_trace_opens_beside_the_runs_own(tmp_path: Path) -> None:
    """Same keys, kinds and units as train/spans.py writes."""
    run = RunFolder(tmp_path)
    spans = Spans()
    with spans("batch", 1):
        pass
    run.write_trace({rank: spans.events(rank) for rank in range(2)})
    real = json.loads(run.trace.read_text())
    planned = json.loads(chrome_trace(choice(Layout(dp=2, pp=2), 4), ranks_per_stage=2))
    assert planned.keys() == real.keys() and planned["displayTimeUnit"] == real["displayTimeUnit"]
    for kind in ("M", "X"):
        mine, theirs = (next(e for e in t["traceEvents"] if e["ph"] == kind) for t in (planned, real))
        assert mine.keys() == theirs.keys() and mine["args"].keys() >= theirs["args"].keys()
    assert {e["pid"] for e in planned["traceEvents"]} == {0, 2}  # first rank of each stage, numbered as in the run


def test_trace_holds_the_whole_step_in_microseconds() -> None:
    made = choice(Layout(pp=4, schedule="zb-h1"), 8)
    timeline = made.timeline()
    events = [e for e in json.loads(chrome_trace(made))["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(timeline.events) + 4  # and what follows the pipeline, on each rank
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(made.predicted.step_seconds.mid * 1e6)
    shown = json.loads(chrome_trace(made, most_micro_batches=4))["traceEvents"]
    assert {e["args"]["micro_batch"] for e in shown if e["ph"] == "X"} == set(range(4))


def test_a_plan_without_a_pipeline_has_a_timeline_too() -> None:
    text = timeline_svg(choice(Layout(dp=2, schedule="zbv"), 3))
    assert "no pipeline, 3 micro-batches one after the other" in text and "0.0 % of it idle" in text
