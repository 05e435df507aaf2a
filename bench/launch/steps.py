"""What a benchmark of launchers reads: a line for each step that a rank has made, and one for each commit.

A launcher is measured by these two files alone. Its ranks append to them from every host: STEPS has {host, pid, group,
rank, world, step, at} for a step whose sum over the ranks was right, `group` the unix time at which the rank's process
group was made. COMMITS has the same from the one rank that saves. A step takes STEP_SECONDS to compute and SAVE_SECONDS
to save, so that a process is most often stopped while it saves.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

STEPS, COMMITS = "steps.jsonl", "commits.jsonl"
STEP_SECONDS, SAVE_SECONDS = 0.05, 0.15


@dataclass(frozen=True)
class Line:
    """A step that one rank has made. `group` and `at` are unix times in seconds."""

    host: str
    pid: int
    group: float
    rank: int
    world: int
    step: int
    at: float


class StepLog:
    """One rank's view of the run's folder, in one process group."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.group = time.time()

    def made(self, step: int) -> None:
        """Writes that this rank has made `step`."""
        self._append(STEPS, step)

    def commit(self, step: int) -> None:
        """Saves as a checkpoint would: some time, then the line that makes it count."""
        time.sleep(SAVE_SECONDS)
        self._append(COMMITS, step)

    def _append(self, name: str, step: int) -> None:
        line = Line(socket.gethostname(), os.getpid(), self.group, self.rank, self.world, step, time.time())
        data = (json.dumps(asdict(line)) + "\n").encode()
        file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, data)
        finally:
            os.close(file)


def read_lines(folder: Path, name: str) -> list[Line]:
    """The lines of STEPS or COMMITS so far, in the order in which they were written."""
    path = folder / name
    if not path.exists():
        return []
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()]


def newest_commit(folder: Path) -> int:
    """The step that a new process group goes on from: that of the last commit, 0 before the first."""
    lines = read_lines(folder, COMMITS)
    return lines[-1].step if lines else 0
