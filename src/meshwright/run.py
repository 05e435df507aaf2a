"""A run is a folder: what was asked, what was planned, what happened, and what was learnt, each a file to open."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from meshwright.files import write_atomic

logger = logging.getLogger("meshwright")

#: Kinds of line in events.jsonl. A "step" line is written every step, the others when they happen.
EVENTS = ("start", "step", "eval", "checkpoint", "failure", "recovery", "end")


class RunFolder:
    """The paths of a run and its event log. Nothing is created until `create` or a write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def create(self) -> RunFolder:
        """Make the folder if need be. Returns self."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def job(self) -> Path:
        """The job as resolved, TOML."""
        return self.path / "job.toml"

    @property
    def plan(self) -> Path:
        """The plan as chosen, JSON."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """One JSON object a line: steps and events."""
        return self.path / "events.jsonl"

    @property
    def manifest(self) -> Path:
        """Folder of the indexed data."""
        return self.path / "manifest"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints/step-N."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of one text log a rank."""
        return self.path / "logs"

    @property
    def trace(self) -> Path:
        """Chrome trace of some steps."""
        return self.path / "trace.json"

    @property
    def report(self) -> Path:
        """Self-contained HTML page."""
        return self.path / "report.html"

    def write_job(self, text: str) -> None:
        write_atomic(self.create().job, text.encode())

    def write_plan(self, plan: dict[str, Any]) -> None:
        write_atomic(self.create().plan, (json.dumps(plan, indent=2, allow_nan=False) + "\n").encode())

    def append_event(self, kind: str, **fields: Any) -> None:
        """Add one line: {"event": kind, "time": unix seconds, ...fields}. One writer a run (rank 0).

        A number that is not finite is null in the file, with its name under "not_finite", so that the file stays
        strict JSON; `read_events` puts it back. Raises ValueError for an unknown kind or a field of that name.
        """
        if kind not in EVENTS:
            raise ValueError(f"unknown event {kind!r}; known: {', '.join(EVENTS)}")
        lost = {
            name: str(value) for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)
        }
        line: dict[str, Any] = {"event": kind, "time": round(time.time(), 3), **fields, **dict.fromkeys(lost)}
        if lost:
            line["not_finite"] = lost
        text = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        _append(self.create().events, text)

    def read_events(self) -> list[dict[str, Any]]:
        """Every whole line so far. A line torn by a crash is left out; [] if there is no log yet."""
        if not self.events.exists():
            return []
        lines = self.events.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole yet
        return [event for line in lines if (event := _parse(line, self.events)) is not None]

    def steps(self) -> list[dict[str, Any]]:
        """The step lines in order of step; where a resumed run did a step again, its last line counts."""
        last = {event["step"]: event for event in self.read_events() if event["event"] == "step"}
        return [last[step] for step in sorted(last)]

    def tail(
        self, until: Callable[[], bool], *, from_end: bool = False, poll_seconds: float = 0.1
    ) -> Iterator[dict[str, Any]]:
        """Yield events as they are written, until `until()` is true and every whole line has been given out.

        `from_end` leaves out what is in the log when `tail` is called.
        """
        offset = self.events.stat().st_size if from_end and self.events.exists() else 0
        return self._follow(offset, until, poll_seconds)

    def _follow(self, offset: int, until: Callable[[], bool], poll_seconds: float) -> Iterator[dict[str, Any]]:
        while True:
            last = until()  # asked before reading, so that what was written before the end is read
            if self.events.exists():
                with open(self.events, "rb") as file:
                    file.seek(offset)
                    fresh = file.read()
                whole = fresh[: fresh.rfind(b"\n") + 1]
                offset += len(whole)
                for line in whole.split(b"\n"):
                    if (event := _parse(line, self.events)) is not None:
                        yield event
            if last:
                return
            time.sleep(poll_seconds)


def _append(path: Path, text: bytes) -> None:
    """One write in append mode: lines of a process that is killed are whole or absent, but for the very last."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            text = b"\n" + text  # a crash tore the line before: end it, so that only that one is lost
        if os.write(handle, text) != len(text):
            raise OSError(f"{path}: the disk took only part of a line")
    finally:
        os.close(handle)


def _parse(line: bytes, path: Path) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        event = json.loads(line)
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise ValueError("not an event")
        if event["event"] == "step" and not isinstance(event.get("step"), int):
            raise ValueError("a step line without a step")
        lost = event.pop("not_finite", {})
        event.update({name: float(text) for name, text in lost.items()})
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("%s: a broken line is left out (%s)", path, error)
        return None
    return event
