"""Ticks, thinning and cut-offs of the charts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.report.charts import (
    Series,
    bytes_in_words,
    line_chart,
    nice_range,
    plain,
    seconds_in_words,
    smoothed,
    thinned,
)

numbers = st.floats(-1e9, 1e9)


@given(numbers, numbers)
def test_ticks_are_even_and_cover_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    first, last, ticks = nice_range(low, high, 5)
    margin = 1e-6 * (abs(low) + abs(high) + (last - first))
    assert first <= low + margin
    assert last >= high - margin
    assert 2 <= len(ticks) <= 12
    gaps = [y - x for x, y in pairwise(ticks)]
    assert max(gaps) == pytest.approx(min(gaps), rel=1e-3)


@given(st.lists(st.floats(0, 100) | st.just(math.nan), min_size=1, max_size=60), st.integers(1, 20))
def test_thinning_keeps_the_mean_and_the_order(values: list[float], most: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    few = thinned(points, most)
    assert len(few) <= most
    assert [x for x, _ in few] == sorted({x for x, _ in few})
    finite = [y for _, y in few if math.isfinite(y)]
    assert all(0 <= y <= 100 for y in finite)
    assert bool(finite) == any(math.isfinite(value) for value in values)


def test_smoothing_keeps_a_line_and_passes_over_gaps() -> None:
    line = tuple((float(step), 3.0 * step) for step in range(50))
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])
    assert smoothed(((1.0, math.inf), (2.0, 5.0))) == ((2.0, 5.0),)


def test_a_first_step_that_compiles_does_not_flatten_the_rest() -> None:
    points = tuple((float(step), 70.0 if step == 1 else 2.0) for step in range(1, 101))
    chart = line_chart("Step time", "", [Series("measured", points)], unit="s", from_zero=True)
    assert chart is not None
    assert chart.note == "1 point above the plot, up to 70 s"
    assert chart.y_ticks[-1].label == "2.5 s"


def test_a_chart_without_a_number_is_none() -> None:
    assert line_chart("Loss", "", [Series("each step", ((1.0, math.nan),))]) is None
    assert line_chart("Loss", "", [Series("each step", ())]) is None


def test_one_step_is_a_dot() -> None:
    chart = line_chart("Loss", "", [Series("each step", ((1.0, 2.0),))])
    assert chart is not None
    assert len(chart.dots) == 1
    assert chart.paths == ()


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.01234"), (3.4567, "3.457"), (1690.4, "1,690"), (12.3, "12.30")]
)
def test_plain_numbers(value: float, text: str) -> None:
    assert plain(value) == text


def test_words_for_seconds_and_bytes() -> None:
    assert [seconds_in_words(s) for s in (0, 0.0123, 2.31, 89, 754, 7260)] == [
        "0 s",
        "12.3 ms",
        "2.31 s",
        "89 s",
        "12 min 34 s",
        "2 h 1 min",
    ]
    assert [bytes_in_words(b) for b in (12, 2048, 1.4 * 2**30, 1010 * 2**30)] == [
        "12 B",
        "2 KiB",
        "1.4 GiB",
        "1,010 GiB",
    ]
