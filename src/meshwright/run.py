"""A run is a folder: its job, plan, events, data, checkpoints, logs and report, each a file or folder to open."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.files import named_in_errors, write_atomic

logger = logging.getLogger("meshwright")

#: Kinds of events. A "step" event is written every step, the others when they happen.
EVENTS = ("start", "step", "eval", "checkpoint", "upload", "failure", "recovery", "without-disk", "copied", "end")

#: A file in a checkpoint's folder that keeps it from being deleted while it is copied elsewhere.
HELD_NAME = ".held"

#: Name of a lease's folder, before its number.
LEASE = ".saving-"
#: Bytes of lines that are read and parsed at once.
READ_BYTES = 1 << 18


class RunFolder:
    """The paths of a run and its event log. Nothing is created until `create` or a write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.job = self.path / "job.toml"  # with every default filled in
        self.plan = self.path / "plan.json"
        self.events = self.path / "events.jsonl"  # one JSON object per line
        self.manifest = self.path / "manifest"  # folder of the indexed data
        self.checkpoints = self.path / "checkpoints"  # folder of step-N
        self.copy = self.path / "copy.json"  # which run of the store at checkpoint.url this is
        self.logs = self.path / "logs"  # folder with a text log per rank
        self.hub = self.path / "hub"  # while the run is at work: how to reach it, for this user alone
        self.trace = self.path / "trace.json"  # Chrome trace of some steps
        self.report = self.path / "report.html"  # one self-contained page

    def create(self) -> RunFolder:
        """Make the folder if need be. Returns self."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder, which must exist, for this process: one run at a time may write it. The kernel releases it
        if the process dies. Raises InputError naming the process that holds it."""
        near = "name another folder with --run DIR"
        try:
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(Problem(str(self.path), f"cannot be written ({error.strerror})", near)) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                what, wait = f"{holder} is at work in it", f"wait until it has ended, or {near}"
                raise InputError(Problem(str(self.path), what, wait)) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def lease(self, generation: int) -> Path:
        """The folder in which checkpoints of a generation of ranks are prepared. Without it none can be committed."""
        return self.checkpoints / f"{LEASE}{generation}"

    def grant_lease(self) -> int:
        """Ends the leases of earlier generations and grants the next; returns its number.

        A rank that is still at work for an earlier one, as on a machine that was cut off, can commit nothing more: a
        commit renames a folder out of the lease, and the lease is gone.
        """
        earlier = [path for path in self.checkpoints.glob(f"{LEASE}*") if path.name.removeprefix(LEASE).isdecimal()]
        number = 1 + max((int(path.name.removeprefix(LEASE)) for path in earlier), default=0)
        self.lease(number).mkdir(parents=True)
        for path in earlier:
            ended = path.with_name(f".ended-{path.name}-{secrets.token_hex(4)}")
            path.rename(ended)  # at once, though files may still be written there
            shutil.rmtree(ended, ignore_errors=True)
        return number

    def write_job(self, text: str) -> None:
        write_atomic(self.create().job, text.encode())

    def write_plan(self, plan: dict[str, Any]) -> None:
        write_atomic(self.create().plan, (json.dumps(plan, indent=2, allow_nan=False) + "\n").encode())

    def write_trace(self, ranks: Mapping[int, list[dict[str, Any]]]) -> None:
        """Writes trace.json, a Chrome trace with a row for each rank, from the events of each."""
        events: list[dict[str, Any]] = []
        for rank, spans in sorted(ranks.items()):
            events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
            events += spans
        write_atomic(self.trace, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())

    def append_event(self, kind: str, **fields: Any) -> None:
        """Add one line: {"event": kind, "time": unix seconds, ...fields}. Only rank 0 of a run writes.

        A number that is not finite is null in the file, and a text under "not_finite", so that the file stays strict
        JSON; `read_events` restores it. Raises ValueError for an unknown kind.
        """
        if kind not in EVENTS:
            raise ValueError(f"unknown event {kind!r}; known: {', '.join(EVENTS)}")
        not_finite = {k: str(v) for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
        line: dict[str, Any] = {"event": kind, "time": round(time.time(), 3), **fields, **dict.fromkeys(not_finite)}
        if not_finite:
            line["not_finite"] = not_finite
        text = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        _append(self.create().events, text)

    def read_events(self) -> list[dict[str, Any]]:
        """The events so far; [] if there is no log yet. A line that a crash cut short is left out."""
        return list(self.each_event())

    def each_event(self) -> Iterator[dict[str, Any]]:
        """`read_events` one by one, for logs that are larger than what memory should hold."""
        if not self.events.exists():
            return
        with open(self.events, "rb") as file:
            while lines := file.readlines(READ_BYTES):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()  # still being written
                yield from _parse_lines(lines, self.events)

    def steps(self) -> list[dict[str, Any]]:
        """The step events in order of step; where a resumed run repeated a step, the last event of that step."""
        last = {event["step"]: event for event in self.read_events() if event["event"] == "step"}
        return [last[step] for step in sorted(last)]

    def tail(
        self, until: Callable[[], bool], *, from_end: bool = False, poll_seconds: float = 0.1
    ) -> Iterator[dict[str, Any]]:
        """Yield events as they are written, until `until()` is true and every complete line has been yielded.

        `from_end` leaves out the events that are in the log when `tail` is called.
        """
        offset = self.events.stat().st_size if from_end and self.events.exists() else 0
        return self._follow(offset, until, poll_seconds)

    def _follow(self, offset: int, until: Callable[[], bool], poll_seconds: float) -> Iterator[dict[str, Any]]:
        while True:
            last = until()  # called before reading, so that all that was written before the end is read
            if self.events.exists():
                with open(self.events, "rb") as file:
                    file.seek(offset)
                    text = file.read()
                text = text[: text.rfind(b"\n") + 1]
                offset += len(text)
                for line in text.split(b"\n"):
                    if (event := _parse(line, self.events)) is not None:
                        yield event
            if last:
                return
            time.sleep(poll_seconds)


def _append(path: Path, text: bytes) -> None:
    """One write in append mode: if the process is killed, only the last line can be incomplete."""
    with named_in_errors(path):
        _append_line(path, text)


def _append_line(path: Path, text: bytes) -> None:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            text = b"\n" + text  # a crash cut the previous line short: end it, so that only that line is lost
        if os.write(handle, text) != len(text):
            raise OSError(errno.ENOSPC, "the disk took only part of a line")
    finally:
        os.close(handle)


def _parse_lines(lines: list[bytes], path: Path) -> Iterator[dict[str, Any]]:
    """The events of whole lines. One call of the parser for many lines takes a third of the time of a call for each."""
    try:
        events = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        events = []
    if len(events) != len(lines):  # there is a broken line: find it
        yield from (event for line in lines if (event := _parse(line, path)) is not None)
        return
    yield from (checked for event in events if (checked := _checked(event, path)) is not None)


def _parse(line: bytes, path: Path) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        event = json.loads(line)
    except ValueError as error:
        logger.warning("%s: a broken line is left out (%s)", path, error)
        return None
    return _checked(event, path)


def _checked(event: Any, path: Path) -> dict[str, Any] | None:
    try:
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise ValueError("not an event")
        if event["event"] == "step" and not isinstance(event.get("step"), int):
            raise ValueError("a step line without a step")
        if "not_finite" in event:
            event.update({name: float(text) for name, text in event.pop("not_finite").items()})
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("%s: a broken line is left out (%s)", path, error)
        return None
    return event
