"""A pipeline's timeline as text."""

from __future__ import annotations

from meshwright.plan.schedule import Timeline

#: Micro-batches that a picture shows; more would be a blur.
MOST_MICRO_BATCHES = 8


def text_rows(timeline: Timeline, width: int = 72) -> list[str]:
    """A row of `width` characters a stage: digits are forwards by micro-batch, letters backwards (a is 0), "." idle."""
    rows = [["."] * width for _ in range(timeline.stages)]
    scale = width / timeline.seconds if timeline.seconds > 0 else 0.0
    for event in timeline.events:
        mark = str(event.micro_batch % 10) if event.kind == "F" else chr(ord("a") + event.micro_batch % 26)
        first = min(width - 1, round(event.start_seconds * scale))
        for column in range(first, max(first + 1, min(width, round(event.stop_seconds * scale)))):
            rows[event.stage][column] = mark
    return ["".join(row) for row in rows]
