"""The timeline as text."""

from __future__ import annotations

from meshwright.plan.schedule import actions, replay
from meshwright.report.timeline import text_rows

TIMELINE = replay(actions("1f1b", 2, 2), [1.0, 1.0], [2.0, 2.0])


def test_text_shows_each_stage_in_time() -> None:
    # 1F1B, two stages, two micro-batches: 9 seconds, one forward of a stage idle on either side.
    rows = text_rows(TIMELINE, width=90)
    assert [len(row) for row in rows] == [90, 90]
    assert rows[0].startswith("0" * 10 + "1" * 10) and rows[1].startswith("." * 10 + "0" * 10 + "a" * 20)
    assert rows[0].endswith("b" * 20)
