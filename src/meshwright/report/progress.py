"""A run's progress, posted to Kubeflow Trainer, which shows it in the status of its TrainJob."""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meshwright.run import RunFolder

logger = logging.getLogger("meshwright")

#: Trainer asks for no more than one post in this time.
SECONDS_BETWEEN = 5.0
ANSWER_SECONDS = 5.0
#: Numbers of a step that are posted as metrics.
METRICS = ("loss", "tokens_per_second")


@dataclass(frozen=True)
class StatusAddress:
    """Where a TrainJob's status is posted, the file with the authority that signed the server's certificate, and the
    file with the token, which is replaced now and then."""

    url: str
    authority: Path
    token: Path


@contextmanager
def posted(run: RunFolder, steps: int, address: StatusAddress | None) -> Iterator[None]:
    """Posts how far the run is while the block runs, every few seconds and at its end; nothing without an address.

    A server that does not answer is named in the log once, and never stops the run.
    """
    if address is None:
        yield
        return
    ended = threading.Event()
    events = run.tail(ended.is_set, from_end=True, poll_seconds=0.25)  # from here on, not from the thread's start
    follower = threading.Thread(target=_follow, args=(events, steps, address), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join(2 * ANSWER_SECONDS)


def _follow(events: Iterator[dict[str, Any]], steps: int, address: StatusAddress) -> None:
    newest: dict[str, Any] | None = None
    last_seconds, failures = -SECONDS_BETWEEN, 0
    for event in events:
        newest = event if event["event"] == "step" else newest
        if newest is not None and time.monotonic() - last_seconds >= SECONDS_BETWEEN:
            failures += _post(status_of(newest, steps), address, say=failures == 0)
            newest, last_seconds = None, time.monotonic()
    if newest is not None:
        _post(status_of(newest, steps), address, say=failures == 0)


def status_of(event: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The body of a post for the event of a step, of `steps` in all."""
    step = int(event["step"])
    numbers = {name: event[name] for name in METRICS if isinstance(event.get(name), int | float)}
    status = {
        "progressPercentage": min(100, 100 * step // steps),
        "estimatedRemainingSeconds": round(max(0, steps - step) * float(event.get("step_seconds") or 0.0)),
        "metrics": [{"name": name, "value": f"{value:.6g}"} for name, value in numbers.items()],
        "lastUpdatedTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {"trainerStatus": status}


def _post(body: Mapping[str, Any], address: StatusAddress, *, say: bool) -> int:
    """1 where the server did not take it, which is logged if `say`, else 0."""
    try:
        headers = {
            "Authorization": f"Bearer {address.token.read_text(encoding='ascii').strip()}",
            "Content-Type": "application/json",
        }
        request = urllib.request.Request(address.url, json.dumps(body).encode(), headers, method="POST")
        context = ssl.create_default_context(cafile=str(address.authority))
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS, context=context) as answer:
            answer.read()
    except (OSError, ValueError) as error:  # URLError and SSLError are OSErrors
        if say:
            logger.warning("the progress cannot be posted to %s: %s", address.url, error)
        return 1
    return 0
