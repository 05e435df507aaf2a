"""Line charts over steps as plain numbers for the page: positions in per cent, ticks, and SVG paths.

A chart's SVG is stretched to the page's width, so it holds lines only. Labels and dots, which must not be stretched,
are HTML positioned in per cent, so that text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

Point = tuple[float, float]  # (step, value)
Scale = Callable[[float], float]
MOST_POINTS = 400
MOST_HOVERS = 120


@dataclass(frozen=True)
class Series:
    """A line. `style` is its class on the page ("faint", "line", "second", "guide"); `dots` marks every point."""

    name: str
    points: tuple[Point, ...]
    style: str = "line"
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two values over the whole width."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Tick:
    percent: float  # from the left, or from the top
    label: str


@dataclass(frozen=True)
class Hover:
    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Dot:
    left: float
    top: float
    style: str
    text: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs. Positions are in per cent of the plot."""

    title: str
    about: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    paths: tuple[tuple[str, str], ...]  # (style, path)
    bands: tuple[tuple[float, float], ...]  # (top, height)
    dots: tuple[Dot, ...]
    hovers: tuple[Hover, ...]
    legend: tuple[tuple[str, str], ...]  # (style, name)
    note: str


def line_chart(
    title: str,
    about: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    bands: Sequence[Band] = (),
    from_zero: bool = False,
) -> Chart | None:
    """A chart of `series` over steps, or None where no series has a finite point.

    Values far above the others (the first step, which compiles) are cut off at the top and counted in the note.
    """
    shown = [Series(s.name, thinned(s.points), s.style, s.dots) for s in series]
    finite = [y for s in shown for _, y in s.points if math.isfinite(y)]
    if not finite:
        return None
    xs = [x for s in series for x, _ in s.points]
    x_low, x_high = min(xs), max(xs)
    top, cut = _top(finite, [band.high for band in bands])
    bottom = 0.0 if from_zero else min([*finite, *(band.low for band in bands)])
    y_low, y_high, y_values = nice_range(bottom, top, 5)

    def left(x: float) -> float:
        return 50.0 if x_high == x_low else 100 * (x - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        return min(100.0, max(0.0, 100 * (y_high - y) / (y_high - y_low)))

    dots = [
        Dot(round(left(x), 3), round(down(y), 3), s.style, f"{s.name}, step {x:g}: {spoken(y, unit)}")
        for s in shown
        if s.dots or len(s.points) == 1
        for x, y in s.points
        if math.isfinite(y)
    ]
    return Chart(
        title=title,
        about=about,
        x_ticks=tuple(Tick(left(x), f"{x:,.0f}") for x in _step_ticks(x_low, x_high)),
        y_ticks=tuple(Tick(down(y), _tick_label(y, y_values, unit)) for y in y_values),
        paths=tuple((s.style, _path(s.points, left, down)) for s in shown if len(s.points) > 1),
        bands=tuple((down(band.high), max(0.6, down(band.low) - down(band.high))) for band in bands),
        dots=tuple(dots),
        hovers=_hovers(shown, left, unit),
        legend=(*((s.style, s.name) for s in shown), *(("band", band.name) for band in bands)),
        note=f"{cut} point{'s' if cut > 1 else ''} above the plot, up to {spoken(max(finite), unit)}" if cut else "",
    )


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """At most `most` points: means of runs of consecutive finite values; a run without one keeps its first value."""
    if len(points) <= most:
        return tuple(points)
    size = -(-len(points) // most)
    result = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        values = [y for _, y in run if math.isfinite(y)]
        result.append((run[-1][0], math.fsum(values) / len(values) if values else run[0][1]))
    return tuple(result)


def smoothed(points: Sequence[Point], share: float = 0.05) -> tuple[Point, ...]:
    """Mean over the neighbours within `share` of all points, half of them on each side; fewer at the ends.

    Centred, so that it does not lag behind a falling loss. Values that are not finite are left out.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    half = max(1, round(share * len(finite) / 2))
    sums = [0.0, *accumulate(y for _, y in finite)]
    result = []
    for index, (x, _) in enumerate(finite):
        reach = min(half, index, len(finite) - 1 - index)
        low, high = index - reach, index + reach + 1
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return tuple(result)


def nice_range(low: float, high: float, count: int) -> tuple[float, float, list[float]]:
    """(low, high, ticks) on round numbers (1, 2 or 5 times a power of ten) around the given range."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):  # flat, as far as a picture can tell
        high = low + (abs(low) if abs(low) > 1e-30 else 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def spoken(value: float, unit: str) -> str:
    """A value with its unit in three or four digits: "1.53 s", "312 ms", "1,690 tokens/s", "4.2 GiB"."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if unit == "s":
        return seconds_in_words(value)
    if unit == "bytes":
        return bytes_in_words(value)
    return f"{plain(value)} {unit}".strip()


def plain(value: float) -> str:
    """Three or four digits: "0.01234", "3.456", "1,690"."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(digits, 0), 5)}f}"


def seconds_in_words(seconds: float) -> str:
    if 0 < seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def bytes_in_words(count: float) -> str:
    for name, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {name}" if count < 1000 * size else f"{count / size:,.0f} {name}"
    return f"{count:.0f} B"


def _top(values: Sequence[float], bands: Sequence[float]) -> tuple[float, int]:
    """The highest value to show, and how many points lie above it: at most a twentieth, far above the others."""
    ordered = sorted(values)
    usual = max([ordered[math.ceil(0.95 * len(ordered)) - 1], *bands])
    if ordered[-1] > 3 * usual > 0:
        return usual * 1.2, sum(value > usual * 1.2 for value in values)
    return max([ordered[-1], *bands]), 0


def _step_ticks(low: float, high: float) -> list[float]:
    if high - low < 1:
        return [low]
    _, _, ticks = nice_range(low, high, 6)
    return [tick for tick in ticks if low <= tick <= high and tick == round(tick)]


def _tick_label(value: float, ticks: Sequence[float], unit: str) -> str:
    if unit in ("s", "bytes"):
        return "0" if value == 0 else spoken(value, unit)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _path(points: Iterable[Point], left: Scale, down: Scale) -> str:
    """SVG path in a box of 100 by 100; a value that is not finite breaks the line."""
    parts, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        parts.append(f"{pen}{left(x):.2f} {down(y):.2f}")
        pen = "L"
    return "".join(parts)


def _hovers(series: Sequence[Series], left: Scale, unit: str) -> tuple[Hover, ...]:
    """Strips of the plot that show their values on hover."""
    tables = [(s.name, dict(s.points)) for s in series if s.style != "guide"]
    steps = sorted({x for _, table in tables for x in table})
    if len(steps) > MOST_HOVERS:
        steps = steps[:: -(-len(steps) // MOST_HOVERS)]
    if len(steps) < 2:
        return ()
    places = [left(x) for x in steps]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), 100.0]
    result = []
    for step, start, stop in zip(steps, edges[:-1], edges[1:], strict=True):
        values = [f"{name} {spoken(table[step], unit)}" for name, table in tables if step in table]
        result.append(Hover(round(start, 3), round(stop - start, 3), f"step {step:g} · " + " · ".join(values)))
    return tuple(result)
