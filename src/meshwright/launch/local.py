"""Processes of this machine, started, watched and ended together."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from meshwright import env as environment
from meshwright.cluster import available_cores
from meshwright.errors import InputError, MeshwrightError, Problem, RunFailed
from meshwright.launch.messages import error_from_dict

POLL_SECONDS = 0.02
LOG_LINES = 12  # of the end of the failing rank's log, in an error
PREFIX = ".workers-"
#: Whether a process keeps the memory that it frees -> glibc's settings. Memory that was returned comes back as pages to
#: be cleared, at a tenth of the memory's speed: keeping it makes a CPU step of our models 5 to 20 % shorter. Pieces of
#: more than 32 MiB, the most that glibc can be told, are returned in any case: kept ones rarely fit the next.
FREED_MEMORY = {
    True: {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    False: {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)},
}


@dataclass(frozen=True)
class LaunchSpec:
    """What to start. `folder` gets a log per rank and, as long as the processes live, a private folder."""

    function: str
    payload: Mapping[str, Any]
    processes: int
    folder: Path
    env: Mapping[str, str]
    interface: str
    grace_seconds: float
    keep_memory: bool


def local(
    function: str,
    payload: Mapping[str, Any],
    processes: int,
    folder: Path | str,
    *,
    env: Mapping[str, str] | None = None,
    interface: str = "lo",
    grace_seconds: float = 5.0,
    keep_memory: bool = True,
) -> LocalProcesses:
    """Start `processes` processes that each call `function(payload, context)`; see `launch.Context`.

    function: "package.module:function", importable from this process's sys.path; payload: JSON.
    folder: rank-k.log is appended there. A private folder inside it (mode 0700, a name that cannot be guessed) holds
        the payload and the rendezvous store, so that other users cannot join the job.
    env: more environment variables; by default each process gets `available_cores() // processes` threads.
    interface: the network interface that gloo and NCCL bind to.
    grace_seconds: from SIGTERM to SIGKILL.
    keep_memory: whether a process keeps the host's memory that it frees, which is quicker and takes more.
    Raises InputError where the payload is not JSON, the folder cannot be written, or there is no such interface.
    """
    if processes < 1:
        raise InputError(Problem("launch", f"{processes} processes", "at least 1"))
    if problem := interface_problem(interface):
        raise InputError(problem)
    spec = LaunchSpec(
        function, payload, processes, Path(folder), dict(env or {}), interface, grace_seconds, keep_memory
    )
    return LocalProcesses(spec)


def interface_problem(name: str) -> Problem | None:
    """What is wrong if this machine has no network interface `name`."""
    names = [known for _, known in socket.if_nameindex()]
    if name in names:
        return None
    return Problem("launch.interface", f"there is no network interface {name!r}", "known: " + ", ".join(names))


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder for processes. Where they fail (RunFailed) the logs stay, since the error names one."""
    folder, failed = Path(tempfile.mkdtemp(prefix=prefix)), False
    try:
        yield folder
    except RunFailed:
        failed = True
        raise
    finally:
        for path in sorted(folder.rglob("*"), reverse=True) if failed else ():
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # it has a log
                    path.rmdir()
            elif path.suffix != ".log":
                path.unlink(missing_ok=True)
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


class LocalProcesses:
    """Processes of this machine that run one function. As a context manager it ends them at exit."""

    def __init__(self, spec: LaunchSpec) -> None:
        self._spec = spec
        self._private, self._lock = _private_folder(spec)
        self._answers = [_answer_file() for _ in range(spec.processes)]
        self._stop_requested = threading.Event()
        self._stopped = False
        self._results: list[Any] = []
        self._error: MeshwrightError | None = None
        started_pids: queue.Queue[list[int] | Exception] = queue.Queue()
        # The kernel sends the death signal when the *thread* that started a process ends. So one thread starts all
        # processes and lives until the last has ended, whatever happens to the caller's thread.
        self._thread = threading.Thread(target=self._watch, args=(started_pids,), name="meshwright-launch", daemon=True)
        self._thread.start()
        pids = started_pids.get()
        if isinstance(pids, Exception):
            self._thread.join()
            raise RunFailed(Problem("launch", f"cannot start a process: {pids}")) from pids
        #: Process ids by rank.
        self.pids: tuple[int, ...] = tuple(pids)

    def poll(self) -> str:
        """ "running", "done", "failed" or "stopped"."""
        if self._thread.is_alive():
            return "running"
        return "failed" if self._error else "stopped" if self._stopped else "done"

    def wait(self, timeout_seconds: float | None = None) -> list[Any]:
        """Results by rank, once every process has ended. Raises the error of the rank that failed first.

        A MeshwrightError keeps its class; any other end (an exception, a signal, an exit without a result) is RunFailed
        and names the rank. Raises TimeoutError after `timeout_seconds` with the processes still running, and RunFailed
        if `stop` ended one before it returned.
        """
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._spec.function} still runs after {timeout_seconds} s")
        if self._error:
            raise self._error
        if self._stopped:
            raise RunFailed(Problem("launch", f"{self._spec.function} was stopped before it ended"))
        return self._results

    def stop(self) -> None:
        """Send SIGTERM to every process, and SIGKILL after the grace time. Returns when all have ended."""
        self._stop_requested.set()
        self._thread.join()

    def log(self, rank: int) -> Path:
        """The file with stdout and stderr of `rank`."""
        return self._spec.folder / f"rank-{rank}.log"

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # All methods below run in the watching thread: only it starts, reaps and signals the processes.

    def _watch(self, started_pids: queue.Queue[list[int] | Exception]) -> None:
        workers: list[subprocess.Popen[bytes]] = []
        try:
            try:
                for rank in range(self._spec.processes):
                    workers.append(self._start(rank))
            except Exception as error:  # raised by the caller's thread, which waits for an answer
                _end(workers, 0)
                started_pids.put(error)
                return
            started_pids.put([worker.pid for worker in workers])
            self._follow(workers)
        finally:
            _end(workers, 0)
            shutil.rmtree(self._private, ignore_errors=True)
            self._lock.close()
            for answer in self._answers:
                answer.close()

    def _follow(self, workers: list[subprocess.Popen[bytes]]) -> None:
        while not self._stop_requested.wait(POLL_SECONDS):
            statuses = [worker.poll() for worker in workers]
            if any(statuses):
                # Poll again: a rank may have died after its poll above, yet before the one that was seen first.
                failed = {rank: status for rank, worker in enumerate(workers) if (status := worker.poll())}
                _end(workers, min(1.0, self._spec.grace_seconds))  # the others cannot go on without it
                self._error = self._first_error(failed)
                return
            if all(status == 0 for status in statuses):
                if not self._take_results(workers):
                    no_result = {rank: 0 for rank in range(len(workers)) if "result" not in self._read_answer(rank)}
                    self._error = self._first_error(no_result)
                return
        _end(workers, self._spec.grace_seconds)
        self._stopped = not self._take_results(workers)  # after SIGTERM a function may still return its result

    def _take_results(self, workers: list[subprocess.Popen[bytes]]) -> bool:
        """Takes the results if every process left one; returns whether it did."""
        answers = [self._read_answer(rank) for rank in range(len(workers))]
        if any(worker.poll() for worker in workers) or not all("result" in answer for answer in answers):
            return False
        self._results = [json.loads(answer["result"]) for answer in answers]
        return True

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        spec = self._spec
        changes = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(spec.processes),
            environment.WORKER_FOLDER: str(self._private),
            environment.WORKER_PARENT: str(os.getpid()),
            environment.WORKER_ANSWER: str(self._answers[rank].fileno()),
            # Workers import from the same places as this process; -P below keeps out the current folder.
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": spec.interface,
            "NCCL_SOCKET_IFNAME": spec.interface,
            **spec.env,
        }
        threads = max(1, available_cores() // spec.processes)
        defaults = {"OMP_NUM_THREADS": str(threads), **FREED_MEMORY[spec.keep_memory]}
        with open(self.log(rank), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "meshwright.launch.worker"],
                env=environment.for_child(changes, defaults),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._answers[rank].fileno()],
                start_new_session=True,  # Ctrl-C reaches the parent only, which ends the workers
            )

    def _read_answer(self, rank: int) -> dict[str, Any]:
        self._answers[rank].seek(0)
        try:
            answer: dict[str, Any] = json.loads(self._answers[rank].read())
        except ValueError:  # none, or only a part of one
            return {}
        return answer

    def _first_error(self, failed: Mapping[int, int]) -> MeshwrightError:
        """The error of the rank that failed first: one killed by a signal (never a consequence), else the earliest."""
        answers = {rank: self._read_answer(rank) for rank in failed}
        first = min(failed, key=lambda rank: (failed[rank] >= 0, answers[rank].get("at", 0.0), rank))
        status, answer = failed[first], answers[first]
        if "error" in answer:
            return error_from_dict(answer["error"])
        what = answer.get("failure") or _status_in_words(status)
        log = self.log(first)
        tail = log.read_bytes()[-20_000:].decode(errors="replace").strip().splitlines()[-LOG_LINES:]
        if tail:
            what += "; the end of its log:\n    " + "\n    ".join(tail) + "\n"
        return RunFailed(Problem(f"rank {first} of {self._spec.processes}", what, f"whole log: {log}"))


def _status_in_words(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (kill -9, or the system ran out of memory)"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status} and left no result"


def _end(workers: list[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """End the process group of every worker: SIGTERM, and SIGKILL after the grace time."""
    _signal(workers, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _signal(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()


def _signal(workers: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        if worker.poll() is None:  # not reaped, so its process id cannot have been reused
            os.killpg(worker.pid, number)


def _private_folder(spec: LaunchSpec) -> tuple[Path, IO[bytes]]:
    """A new folder of mode 0700 with the spec in it, and the lock that is held as long as the folder is needed."""
    try:
        text = json.dumps({"function": spec.function, "payload": spec.payload}, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise InputError(Problem("launch", f"the payload is not JSON: {error}")) from error
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
        _sweep(spec.folder)
        private = Path(tempfile.mkdtemp(prefix=PREFIX, dir=spec.folder.absolute()))
        lock = open(private / "lock", "wb")  # noqa: SIM115 - held open on purpose
        fcntl.flock(lock, fcntl.LOCK_EX)
        handle = os.open(private / "spec.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(text)
    except OSError as error:
        raise InputError(Problem(str(spec.folder), f"cannot be written: {error.strerror}")) from error
    return private, lock


def _answer_file() -> IO[bytes]:
    """A file for a worker's answer, in memory: a full disk must not swallow its error."""
    return os.fdopen(os.memfd_create("answer"), "r+b", buffering=0)


def _sweep(folder: Path) -> None:
    """Remove private folders that a killed parent left behind: no process holds their lock."""
    for private in folder.glob(PREFIX + "*"):
        try:
            with open(private / "lock", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(private, ignore_errors=True)
        except OSError:
            continue  # its parent lives, or is just creating it
