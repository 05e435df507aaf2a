"""The time of each part of a step on each rank, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshwright.files import write_atomic
from meshwright.run import RunFolder

#: Spans that a rank keeps: the last steps of a run. A step has five, and two for each micro-batch.
MAX_SPANS = 2000


class Spans:
    """The newest MAX_SPANS named spans of one rank. Host time: on a GPU, the time to queue work, not to do it."""

    def __init__(self) -> None:
        self._spans: deque[tuple[str, float, float, dict[str, int]]] = deque(maxlen=MAX_SPANS)

    @contextmanager
    def __call__(self, name: str, step: int) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self._spans.append((name, start, time.time() - start, {"step": step}))

    def write(self, run: RunFolder, rank: int) -> None:
        """Writes this rank's part beside its log; `merge` makes one trace of all parts."""
        events = [
            {"name": name, "ph": "X", "ts": start * 1e6, "dur": seconds * 1e6, "pid": rank, "tid": 0, "args": args}
            for name, start, seconds, args in self._spans
        ]
        _part(run, rank).write_text(json.dumps(events))


def merge(run: RunFolder, world: int) -> None:
    """Writes trace.json from the parts of all ranks, one row per rank."""
    events = []
    for rank in range(world):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        part = _part(run, rank)
        events += json.loads(part.read_text())
        part.unlink()
    write_atomic(run.trace, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def _part(run: RunFolder, rank: int) -> Path:
    return run.logs / f"trace-{rank}.json"
