"""Ranks as processes of this node: started, watched and ended by its agent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from meshwright import env as environment
from meshwright.cluster import available_cores
from meshwright.launch.messages import RankPlace

POLL_SECONDS = 0.02
LOG_LINES = 12  # of the end of a failing rank's log, in an error
#: A rank that is held by SIGSTOP for so long has failed: others wait for it.
STOPPED_SECONDS = 5.0
#: Whether a process keeps the memory that it frees -> glibc's settings. Memory that was returned comes back as pages to
#: be cleared, at a tenth of the memory's speed: keeping it makes a CPU step of our models 5 to 20 % shorter. Pieces of
#: more than 32 MiB, the most that glibc can be told, are returned in any case: kept ones rarely fit the next.
FREED_MEMORY = {
    True: {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    False: {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)},
}


@dataclass(frozen=True)
class RankStart:
    """What one rank runs: `function(payload, context)`, in the environment of the agent with the changes `env`."""

    place: RankPlace
    function: str
    payload: Any
    env: Mapping[str, str]
    keep_memory: bool


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended: with `answer["result"]`, or as the Failure kind `kind` says ("asked": after `end`)."""

    place: RankPlace
    kind: str
    message: str
    answer: Mapping[str, Any]
    log_tail: str


class RankProcesses:
    """The ranks of one generation on this node. Its methods belong to one thread, which must outlive the ranks: the
    kernel ends a rank when the thread that started it ends."""

    def __init__(self, ranks: Iterable[RankStart], folder: Path, interface: str) -> None:
        """Starts them all, or raises OSError or ValueError and leaves none. `folder` gets a log per rank; gloo and NCCL
        are bound to `interface`."""
        self._folder, self._interface = folder, interface
        self._ranks: list[_Rank] = []
        self._memory_kills = _memory_kills()
        starts = list(ranks)
        threads = max(1, available_cores() // len(starts))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for start in starts:
                self._ranks.append(self._start(start, threads))
        except Exception:
            self.kill()
            raise

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    @property
    def places(self) -> list[RankPlace]:
        return [rank.start.place for rank in self._ranks]

    @property
    def running(self) -> list[RankPlace]:
        return [rank.start.place for rank in self._ranks if not rank.told]

    def poll(self) -> list[RankEnd]:
        """The ranks that have ended since the last call. Kills those whose grace is over, and those held by SIGSTOP."""
        now = time.monotonic()
        for rank in self._ranks:
            if rank.process.poll() is None:
                if rank.kill_at is not None and now >= rank.kill_at:
                    _signal(rank, signal.SIGKILL)
                elif rank.kill_at is None and self._is_held(rank, now):
                    rank.held = True
                    _signal(rank, signal.SIGKILL)
        ended = [rank for rank in self._ranks if not rank.told and rank.process.poll() is not None]
        for rank in ended:
            rank.told = True
        return [self._end_of(rank) for rank in ended]

    def end(self, role: str, grace_seconds: float) -> None:
        """Asks the ranks of `role` ("": all) to end: SIGTERM now, SIGKILL by `poll` after the grace."""
        deadline = time.monotonic() + grace_seconds
        for rank in self._ranks:
            if role in ("", rank.start.place.role) and rank.process.poll() is None:
                rank.kill_at = deadline if rank.kill_at is None else min(rank.kill_at, deadline)
                if not rank.asked:
                    rank.asked = True
                    _signal(rank, signal.SIGTERM)

    def ask_to_save(self) -> None:
        """SIGTERM to every rank, without a deadline: a rank that trains saves and returns."""
        for rank in self._ranks:
            rank.saves = True
            _signal(rank, signal.SIGTERM)

    def kill(self) -> None:
        """Ends every rank at once, and waits."""
        for rank in self._ranks:
            _signal(rank, signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()
            rank.close()

    def hand(self, secret: str) -> None:
        """Gives the ranks a new secret for the hub."""
        for rank in self._ranks:
            rank.write_spec(secret)

    def log(self, place: RankPlace) -> Path:
        """The file with stdout and stderr of a rank."""
        return self._folder / log_name(place.role, place.rank)

    def _start(self, start: RankStart, threads: int) -> _Rank:
        place = start.place
        rank = _Rank(start)
        changes = {
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local_rank),
            "WORLD_SIZE": str(place.world),
            environment.WORKER_PARENT: str(os.getpid()),
            environment.WORKER_SPEC: str(rank.spec.fileno()),
            environment.WORKER_ANSWER: str(rank.answer.fileno()),
            # Ranks import from the same places as this process; -P below keeps out the current folder.
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": self._interface,
            "NCCL_SOCKET_IFNAME": self._interface,
            **start.env,
        }
        defaults = {"OMP_NUM_THREADS": str(threads), **FREED_MEMORY[start.keep_memory]}
        try:
            with open(self.log(place), "ab") as log:
                rank.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "meshwright.launch.worker"],
                    env=environment.for_rank(changes, defaults),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[rank.spec.fileno(), rank.answer.fileno()],
                    start_new_session=True,  # Ctrl-C reaches the driver only, which ends the ranks
                )
        except Exception:
            rank.close()
            raise
        return rank

    def _is_held(self, rank: _Rank, now: float) -> bool:
        """Whether the rank has been held by SIGSTOP for STOPPED_SECONDS. /proc is read once a second."""
        if now - rank.seen >= 1.0:
            rank.seen = now
            if _state(rank.process.pid) != "T":
                rank.held_since = None
            elif rank.held_since is None:
                rank.held_since = now
        return rank.held_since is not None and now - rank.held_since >= STOPPED_SECONDS

    def _end_of(self, rank: _Rank) -> RankEnd:
        answer, status = rank.read_answer(), rank.process.returncode
        rank.close()
        place = rank.start.place
        if "result" in answer and status == 0:
            return RankEnd(place, "", "", answer, "")
        kind, message = self._words(rank, answer, status)
        return RankEnd(place, kind, message, answer, self._tail(place))

    def _words(self, rank: _Rank, answer: Mapping[str, Any], status: int) -> tuple[str, str]:
        """Kind and message of an end without a result."""
        if rank.held:
            return "stopped", f"was held by SIGSTOP for {STOPPED_SECONDS:g} s, and ended"
        if "error" in answer:
            return ("asked" if rank.asked else "refused"), "refused its work"
        if rank.asked and "failure" not in answer:
            return "asked", "was asked to end"
        if status == -signal.SIGTERM and rank.saves:
            return "asked", "was asked to end before it had begun"
        if status == -signal.SIGKILL and _memory_kills() > self._memory_kills:
            return "memory", "was killed because the memory of its control group is used up"
        if status == -signal.SIGKILL:
            return "signal", "was killed by SIGKILL (kill -9, or the system ran out of memory)"
        if status < 0:
            return "signal", f"was killed by {signal.Signals(-status).name}"
        if "failure" in answer:
            return ("asked" if rank.asked else "error"), answer["failure"]
        return "exit", f"ended with exit code {status} and left no result"

    def _tail(self, place: RankPlace) -> str:
        """The last lines of a rank's log."""
        with open(self.log(place), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 20_000))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-LOG_LINES:])


class _Rank:
    """A rank's process, and its files in memory: its work, and its answer, which a full disk must not swallow."""

    process: subprocess.Popen[bytes]

    def __init__(self, start: RankStart) -> None:
        self.start = start
        self.spec, self.answer = _memory_file("spec"), _memory_file("answer")
        self.asked = self.told = self.held = self.saves = False
        self.kill_at: float | None = None
        self.held_since: float | None = None
        self.seen = time.monotonic()
        self.write_spec(start.place.dial.secret)

    def write_spec(self, secret: str) -> None:
        """Writes what the rank reads at its start, and again where its secret is refused."""
        place = self.start.place
        dial = {**asdict(place.dial), "secret": secret}
        content = {**asdict(place), "folder": str(place.folder), "dial": dial}
        text = json.dumps({"function": self.start.function, "payload": self.start.payload, "place": content}).encode()
        os.pwrite(self.spec.fileno(), text, 0)
        os.ftruncate(self.spec.fileno(), len(text))

    def read_answer(self) -> dict[str, Any]:
        self.answer.seek(0)
        try:
            answer: dict[str, Any] = json.loads(self.answer.read())
        except ValueError:  # none, or only a part of one
            return {}
        return answer

    def close(self) -> None:
        self.spec.close()
        self.answer.close()


def log_name(role: str, rank: int) -> str:
    """The name of a rank's log: rank-0.log, or with another role than that of the ranks that compute, data-0.log."""
    return f"{role}-{rank}.log"


def _memory_file(name: str) -> IO[bytes]:
    return os.fdopen(os.memfd_create(name), "r+b", buffering=0)


def _signal(rank: _Rank, number: signal.Signals) -> None:
    if rank.process.poll() is None:  # not reaped, so its process id cannot have been reused
        os.killpg(rank.process.pid, number)


def _state(pid: int) -> str:
    """The letter of a process's state in /proc; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _memory_kills() -> int:
    """How many processes of this control group the kernel has killed for want of memory."""
    for folder in environment.control_groups("memory"):
        events = folder / "memory.events"
        if events.exists():
            counts = dict(line.split() for line in events.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0
