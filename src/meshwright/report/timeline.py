"""A pipeline's timeline as text, as a self-contained SVG, and as a Chrome trace to compare with that of a run."""

from __future__ import annotations

import json
from xml.sax.saxutils import escape

from meshwright.plan import Choice
from meshwright.plan.pipeline.actions import stage_ranks
from meshwright.plan.pipeline.replay import ActionSpan, Timeline

#: Micro-batches that a picture shows: more could not be told apart.
MOST_MICRO_BATCHES = 8
MOST_IN_SVG = 16
#: Micro-batches of a trace: enough for a full pipeline, and still quick to open.
MOST_IN_TRACE = 256
KIND_WORDS = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"}

#: Sizes of the SVG, in its own units.
WIDTH, LEFT, TOP, ROW, BAR, FOOT = 1200.0, 76.0, 64.0, 30.0, 22.0, 34.0
MOST_ROWS = 32
#: The colours by kind of action, in light and dark. A second virtual stage is drawn paler; text stays readable on all.
STYLE = """
svg{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;--ink:#1b2733;--soft:#5c6b7a;--paper:#fff;--lane:#eef1f4;
--F:#b9d3f5;--B:#f6cfa3;--I:#f6cfa3;--W:#bfe3c8;--edge:#fff}
@media(prefers-color-scheme:dark){svg{--ink:#e7edf3;--soft:#9aa8b5;--paper:#12181f;--lane:#1d2630;
--F:#24538f;--B:#8a5220;--I:#8a5220;--W:#2c6b43;--edge:#12181f}}
.paper{fill:var(--paper)}.lane{fill:var(--lane)}text{fill:var(--ink)}.soft{fill:var(--soft)}.title{font-size:15px;
font-weight:600}.no{font-size:10px;text-anchor:middle;pointer-events:none}.F{fill:var(--F)}.B{fill:var(--B)}
.I{fill:var(--I)}.W{fill:var(--W)}.a{stroke:var(--edge);stroke-width:.6}.later{fill-opacity:.62}
.I.a{stroke-dasharray:2 1}""".strip()


def text_rows(timeline: Timeline, width: int = 72) -> list[str]:
    """A row of `width` characters per rank: digits are forward passes by micro-batch, letters backward passes (a is
    micro-batch 0), "+" weight gradients, "." idle."""
    rows = [["."] * width for _ in range(timeline.ranks)]
    scale = width / timeline.seconds if timeline.seconds > 0 else 0.0
    for event in timeline.events:
        first = min(width - 1, round(event.start_seconds * scale))
        for column in range(first, max(first + 1, min(width, round(event.stop_seconds * scale)))):
            rows[event.rank][column] = _mark(event)
    return ["".join(row) for row in rows]


def _mark(event: ActionSpan) -> str:
    if event.kind == "W":
        return "+"
    return str(event.micro_batch % 10) if event.kind == "F" else chr(ord("a") + event.micro_batch % 26)


def timeline_svg(choice: Choice, most_micro_batches: int = MOST_IN_SVG) -> str:
    """The pipeline of a choice as a picture: a row per rank, time from left to right, numbered by micro-batch.

    Self-contained, for light and dark. Of many micro-batches the first are shown, of many ranks the first and the last;
    the caption gives the bubble share of the part shown and of the whole step.
    """
    timeline = choice.timeline(most_micro_batches)
    ranks = _shown_ranks(timeline.ranks)
    scale = (WIDTH - LEFT - 16) / timeline.seconds if timeline.seconds > 0 else 0.0
    height = TOP + ROW * len(ranks) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(_title(choice), {chr(34): "&quot;"})}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH:g}" height="{height:g}"/>',
        f'<text class="title" x="12" y="24">{escape(_title(choice))}</text>',
        f'<text class="soft" x="12" y="44">{escape(_about(choice, timeline))}</text>',
        *_legend(choice, timeline),
    ]
    home = stage_ranks(choice.layout.schedule, choice.layout.pp, choice.layout.vpp) if choice.layout.pp > 1 else (0,)
    for row, rank in enumerate(ranks):
        top = TOP + ROW * row
        if rank is None:
            parts.append(f'<text class="soft" x="12" y="{top + 16:g}">…</text>')
            continue
        parts.append(f'<text x="12" y="{top + 16:g}">{"rank" if choice.layout.vpp > 1 else "stage"} {rank}</text>')
        parts.append(
            f'<rect class="lane" x="{LEFT:g}" y="{top:g}" width="{timeline.seconds * scale:.2f}" height="22"/>'
        )
        first = home.index(rank)
        parts += [_bar(event, top, scale, event.stage != first) for event in timeline.rows()[rank]]
    parts += _axis(timeline, height, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(event: ActionSpan, top: float, scale: float, later: bool) -> str:
    seconds = event.stop_seconds - event.start_seconds
    left, width = LEFT + event.start_seconds * scale, seconds * scale
    words = f"{KIND_WORDS[event.kind]} of micro-batch {event.micro_batch}, stage {event.stage}, {_seconds(seconds)}"
    bar = (
        f'<rect class="a {event.kind}{" later" if later else ""}" x="{left:.2f}" y="{top:g}" width="{width:.2f}" '
        f'height="{BAR:g}"><title>{words}</title></rect>'
    )
    if width < 7 * len(str(event.micro_batch)) + 3:
        return bar
    return f'{bar}<text class="no" x="{left + width / 2:.2f}" y="{top + 15:g}">{event.micro_batch}</text>'


def _shown_ranks(ranks: int) -> list[int | None]:
    if ranks <= MOST_ROWS:
        return list(range(ranks))
    half = MOST_ROWS // 2
    return [*range(half), None, *range(ranks - half, ranks)]


def _title(choice: Choice) -> str:
    if choice.layout.pp == 1:
        return f"no pipeline, {choice.micro_batches} micro-batches one after the other"
    virtual = f" x {choice.layout.vpp} virtual" if choice.layout.vpp > 1 else ""
    return (
        f"{choice.layout.schedule} pipeline, {choice.layout.pp}{virtual} stages, {choice.micro_batches} micro-batches"
    )


def _about(choice: Choice, timeline: Timeline) -> str:
    shown = len({event.micro_batch for event in timeline.events})
    text = f"{_seconds(timeline.seconds)} as predicted, {100 * timeline.bubble:.1f} % of it idle (bubble)"
    if shown == choice.micro_batches:
        return text
    step = choice.predicted.step_seconds.mid
    share = choice.predicted.breakdown.get("bubble", 0.0) / step if step > 0 else 0.0
    return f"the first {shown} micro-batches alone: {text}; of the whole step {100 * share:.1f} %"


def _legend(choice: Choice, timeline: Timeline) -> list[str]:
    kinds = [kind for kind in KIND_WORDS if any(event.kind == kind for event in timeline.events)]
    parts, left = [], WIDTH - 16.0
    if choice.layout.vpp > 1:
        left -= 150
        parts.append(f'<text class="soft" x="{left:g}" y="24">paler: later virtual stages</text>')
    for kind in reversed(kinds):
        left -= 34 + 6.6 * len(KIND_WORDS[kind])
        parts.append(f'<rect class="a {kind}" x="{left:.1f}" y="14" width="12" height="12"/>')
        parts.append(f'<text x="{left + 17:.1f}" y="24">{KIND_WORDS[kind]}</text>')
    return parts


def _axis(timeline: Timeline, height: float, scale: float) -> list[str]:
    parts = []
    for index in range(6):
        seconds = timeline.seconds * index / 5
        anchor = "start" if index == 0 else "end" if index == 5 else "middle"
        place = LEFT + seconds * scale
        parts.append(
            f'<text class="soft" x="{place:.1f}" y="{height - 12:g}" text-anchor="{anchor}">{_seconds(seconds)}</text>'
        )
    return parts


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 or seconds == 0 else f"{seconds * 1e3:.3g} ms"


def chrome_trace(choice: Choice, ranks_per_stage: int = 1, most_micro_batches: int | None = None) -> str:
    """One predicted step as a Chrome trace (chrome://tracing, ui.perfetto.dev) in the form of a run's trace.json: a
    process per rank, complete events in microseconds.

    The first rank of each stage stands for the `ranks_per_stage` that do the same, and keeps its number in the run, so
    that both traces can be compared. Rows are named "planned rank N". Times start at 0.
    """
    timeline = choice.timeline(most_micro_batches)
    events: list[dict[str, object]] = []
    for rank, row in enumerate(timeline.rows()):
        pid = rank * ranks_per_stage
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": f"planned rank {pid}"}})
        events += [_complete(event, pid) for event in row]
    after = max(0.0, choice.predicted.step_seconds.mid - timeline.seconds)
    if after > 0 and len({event.micro_batch for event in timeline.events}) == choice.micro_batches:
        rest = {
            "name": "gradients and optimizer",
            "ph": "X",
            "ts": timeline.seconds * 1e6,
            "dur": after * 1e6,
            "tid": 0,
        }
        events += [{**rest, "pid": rank * ranks_per_stage, "args": {"step": 1}} for rank in range(timeline.ranks)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)


def _complete(event: ActionSpan, pid: int) -> dict[str, object]:
    return {
        "name": KIND_WORDS[event.kind],
        "ph": "X",
        "ts": event.start_seconds * 1e6,
        "dur": (event.stop_seconds - event.start_seconds) * 1e6,
        "pid": pid,
        "tid": 0,
        "args": {"step": 1, "stage": event.stage, "micro_batch": event.micro_batch},
    }
