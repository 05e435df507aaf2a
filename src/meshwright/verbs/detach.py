"""`--detach`: the driver of a run or a server as a process of its own, which outlives the terminal that started it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright import env
from meshwright.errors import CannotWork, InputError, MeshwrightError, Problem, RunFailed
from meshwright.launch.access import HUB_FOLDER, PEOPLE, read_private
from meshwright.launch.hub_files import FACTS

POLL_SECONDS = 0.1
LOG_LINES = 12
#: Exit code of a driver -> the error that its caller gets; RunFailed for any other.
ERRORS: dict[int, type[MeshwrightError]] = {error.exit_code: error for error in (InputError, CannotWork, RunFailed)}


def detach(arguments: Sequence[str], folder: Path, ready: Path | None = None) -> dict[str, Any]:
    """Starts `meshwright ARGUMENTS` as a driver of its own, whose run folder is `folder`; returns {"run", "pid", "log"}
    once its ranks have begun to start, and where `ready` is given it has written that file.

    Raises an error of the exit code that it has, with what it has said, where it ends before.
    """
    log = folder / "logs" / "driver.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    said = log.stat().st_size if log.exists() else 0  # by drivers before it
    before = _written_ns(ready)  # by a driver that was killed
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "meshwright", *arguments],
            env=env.for_child({env.DETACHED: "1"}, {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # no signal of this terminal reaches it
        )
    while not (_is_at_work(folder / HUB_FOLDER, process.pid) and (ready is None or _written_ns(ready) != before)):
        if process.poll() is not None:
            if process.returncode == 0:  # a run that had nothing left to do
                break
            tail = "\n    ".join(log.read_bytes()[said:].decode(errors="replace").splitlines()[-LOG_LINES:])
            what = f"ended with exit code {process.returncode}; the end of its log:\n    {tail}\n"
            error = ERRORS.get(process.returncode, RunFailed)
            raise error(Problem("the driver", what, f"whole log: {log}"))
        time.sleep(POLL_SECONDS)
    return {"run": str(folder), "pid": process.pid, "log": str(log)}


def _written_ns(path: Path | None) -> int | None:
    """When a file was last written; None where there is none."""
    try:
        return None if path is None else path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _is_at_work(hub: Path, driver: int) -> bool:
    """Whether the files in `hub` are complete and of the process `driver`: one that was killed may have left some."""
    try:
        return (hub / PEOPLE).exists() and read_private(hub / FACTS)["pid"] == driver
    except FileNotFoundError:  # not yet, or withdrawn while we looked
        return False
