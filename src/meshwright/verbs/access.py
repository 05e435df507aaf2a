"""`status`, `stop` and `logs`: what a run is doing, its end, and what its ranks print, from any terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem, RunFailed

if TYPE_CHECKING:
    from meshwright.run import RunFolder

POLL_SECONDS = 0.2
READ_BYTES = 1 << 20
#: Where runs are looked for when none is named.
RUNS = "runs"


def status(runs: Sequence[str | Path] = ()) -> list[dict[str, Any]]:
    """What each run is doing: {"run", "state", "step", "steps", "loss", "tokens_per_second", "generation", "nodes",
    "ranks", "failures", "seconds"}, None for what is not known. `runs` are run folders (default: those in runs/).

    States: running; unreachable (its driver was killed, or is on another machine); done; stopped (it can be resumed);
    failed; new (it has not begun); ended (a server); unreadable (another user's, among several; why is in "failures").
    Raises InputError for a folder that holds no run.
    """
    folders = [_run_folder(path) for path in runs] if runs else _runs_here()
    return [_status_of(folder) if len(folders) == 1 else _readable_status_of(folder) for folder in folders]


def stop(run: str | Path, *, timeout_seconds: float = 120.0) -> dict[str, Any]:
    """Has a run save and end; returns its `status` once it has. Raises InputError where the folder holds no run at
    work, RunFailed where it does not answer or has not ended after `timeout_seconds`."""
    from meshwright.launch.people import ask_to_stop

    folder = _run_folder(run)
    if not ask_to_stop(folder.hub):
        raise InputError(Problem(str(folder.path), "is not at work", "see meshwright status"))
    deadline = time.monotonic() + timeout_seconds
    while folder.hub.exists():
        if time.monotonic() > deadline:
            raise RunFailed(Problem(str(folder.path), f"has not ended after {timeout_seconds:g} s"))
        time.sleep(POLL_SECONDS)
    return _status_of(folder)


def logs(run: str | Path, *, rank: int | None = None, follow: bool = False) -> Iterator[tuple[str, str]]:
    """The lines that ranks have printed, with the name of their log ("rank-0", "driver"): of one rank, or of all, log
    by log. `follow` goes on, with lines as they come, as long as the run is at work.

    Raises InputError where the folder holds no run, or the run no such rank.
    """
    folder = _run_folder(run)
    known = _logs_of(folder)
    if rank is not None and f"rank-{rank}" not in known:
        there = ", ".join(known) or "none"
        raise InputError(Problem(str(folder.path), f"has no log of rank {rank}", f"there are: {there}"))

    def wanted() -> dict[str, Path]:
        return {name: path for name, path in _logs_of(folder).items() if rank is None or name == f"rank-{rank}"}

    return _lines(wanted, lambda: follow and folder.hub.exists())


def _logs_of(folder: RunFolder) -> dict[str, Path]:
    """The logs that are there now, by name."""
    return {path.stem: path for path in sorted(folder.logs.glob("*.log"), key=_order)}


def _order(path: Path) -> tuple[str, int]:
    role, _, number = path.stem.rpartition("-")
    return (role, int(number)) if number.isdecimal() else (path.stem, 0)


def _lines(logs_now: Callable[[], dict[str, Path]], goes_on: Callable[[], bool]) -> Iterator[tuple[str, str]]:
    """Complete lines of each log, of those too that come later, and once nothing more comes the rest."""
    offsets: dict[str, int] = {}
    last = False
    while True:
        for name, path in logs_now().items():
            offsets.setdefault(name, 0)
            with open(path, "rb") as log:
                log.seek(offsets[name])
                while text := log.read(READ_BYTES):
                    end = len(text) if last else text.rfind(b"\n") + 1
                    if not end and len(text) < READ_BYTES:
                        break
                    end = end or len(text)
                    yield from ((name, line) for line in text[:end].decode(errors="replace").splitlines())
                    offsets[name] += end
                    log.seek(offsets[name])
        if last:
            return
        last = not goes_on()
        if not last:
            time.sleep(POLL_SECONDS)


def _run_folder(path: str | Path) -> RunFolder:
    from meshwright.run import RunFolder

    folder = RunFolder(path)
    if not (folder.job.exists() or folder.hub.exists() or folder.logs.exists()):
        near = ", ".join(str(one.path) for one in _runs_here()) or "none"
        raise InputError(Problem(str(path), "holds no run", f"runs here: {near}"))
    return folder


def _runs_here() -> list[RunFolder]:
    from meshwright.run import RunFolder

    here = Path(RUNS)
    found = [RunFolder(path) for path in sorted(here.iterdir()) if path.is_dir()] if here.is_dir() else []
    return [folder for folder in found if folder.job.exists() or folder.hub.exists()]


def _readable_status_of(folder: RunFolder) -> dict[str, Any]:
    """As `_status_of`; a run that this user may not read does not keep the others' from being told."""
    try:
        return _status_of(folder)
    except (InputError, PermissionError) as error:
        return _nothing_known(folder, "unreadable") | {"failures": [str(error)]}


def _nothing_known(folder: RunFolder, state: str) -> dict[str, Any]:
    found: dict[str, Any] = {"run": str(folder.path), "state": state, "step": None, "steps": None, "loss": None}
    return found | {
        "tokens_per_second": None,
        "generation": None,
        "nodes": [],
        "ranks": [],
        "failures": [],
        "seconds": None,
    }


def _status_of(folder: RunFolder) -> dict[str, Any]:
    from meshwright.launch.people import hub_status

    found = _nothing_known(folder, "new" if folder.job.exists() else "ended")
    for event in folder.each_event():
        kind = event["event"]
        if kind == "start":
            found |= {"state": "stopped", "step": event["step"], "steps": event.get("steps")}
        elif kind == "step":
            found |= {name: event.get(name) for name in ("step", "loss", "tokens_per_second")}
        elif kind == "failure":
            found["state"] = "failed"
            found["failures"].append(event["reason"])
        elif kind == "end":
            found["state"] = "done" if event.get("finished") else "stopped"
    try:
        hub = hub_status(folder.hub)
    except RunFailed:
        return found | {"state": "unreachable", "tokens_per_second": None}
    if hub is None:
        return found | {"tokens_per_second": None}
    nodes = [
        {"name": node.name, "address": node.address, "kind": node.kind, "devices": node.devices} for node in hub.nodes
    ]
    return found | {
        "state": "running",
        "generation": hub.generation,
        "nodes": nodes,
        "ranks": list(hub.ranks),
        "seconds": hub.seconds,
    }
