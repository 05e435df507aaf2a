"""The time of each part of a step on each rank, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    def events(self, rank: int) -> list[dict[str, Any]]:
        """The spans as events of a Chrome trace, in the row of `rank`; see RunFolder.write_trace."""
        return [
            {"name": name, "ph": "X", "ts": start * 1e6, "dur": seconds * 1e6, "pid": rank, "tid": 0, "args": args}
            for name, start, seconds, args in self._spans
        ]
