"""Ranks on this machine: its agent is a thread of the driver."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwright.cluster import available_cores, memory_bytes
from meshwright.errors import InputError, Problem, RunFailed
from meshwright.launch.attend import Agent
from meshwright.launch.driver import Launch, start
from meshwright.launch.groups import Need, Node, RankGroup
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.network import interface_problem
from meshwright.launch.versions import own_versions


class LocalBackend:
    """This machine as one node with `devices` devices, which may be more than there are: ranks of one share it."""

    def __init__(self, devices: int, *, kind: str = "cpu", interface: str = "lo") -> None:
        """Raises InputError where there is no network interface `interface`, which gloo and NCCL are bound to."""
        if problem := interface_problem(interface):
            raise InputError(problem)
        name = socket.gethostname()
        self._node = Node(name, "127.0.0.1", interface, kind, devices, available_cores(), memory_bytes())
        self._files: HubFiles | None = None
        self._agent: threading.Thread | None = None

    def open(self, files: HubFiles) -> None:
        self._files = files

    def listen(self) -> Sequence[str]:
        return ()

    def nodes(self, attending: Sequence[Node]) -> Sequence[Node]:
        return [self._node]

    def agents(self, wanted: Mapping[str, Sequence[Need]]) -> None:
        if self._agent is None:
            assert self._files is not None
            agent = Agent(self._files.local, self._node, own_versions(), patience_seconds=float("inf"))
            self._agent = threading.Thread(target=agent.run, name="meshwright-agent", daemon=True)
            self._agent.start()

    def close(self) -> None:
        if self._agent is not None:
            self._agent.join()


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
    **options: Any,
) -> Launch:
    """Start `processes` processes of this machine that each call `function(payload, context)`; see `launch.Context`.

    function: "package.module:function", importable from this process's sys.path; payload: JSON.
    folder: rank-k.log is appended there.
    env: more environment variables; by default each process gets `available_cores() // processes` threads.
    interface: the network interface that gloo and NCCL bind to.
    grace_seconds: from SIGTERM to SIGKILL.
    keep_memory: whether a process keeps the host's memory that it frees, which is quicker and takes more.
    options: further ones of Launch.
    Raises InputError where the payload is not JSON, the folder cannot be written, or there is no such interface.
    """
    if processes < 1:
        raise InputError(Problem("launch", f"{processes} processes", "at least 1"))
    backend = LocalBackend(processes, interface=interface)
    group = RankGroup("rank", function, payload, processes, need=Need(), env=env or {}, keep_memory=keep_memory)
    check_payload(payload)
    make_log_folder(Path(folder))
    return start(backend, [group], folder, grace_seconds=grace_seconds, **options)


def check_payload(payload: Mapping[str, Any]) -> None:
    """Raises InputError where `payload` is not JSON."""
    try:
        json.dumps(payload, allow_nan=True)
    except (TypeError, ValueError) as error:
        raise InputError(Problem("launch", f"the payload is not JSON: {error}")) from error


def make_log_folder(folder: Path) -> None:
    """Makes the folder for the ranks' logs. Raises InputError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(Problem(str(folder), f"cannot be written: {error.strerror}")) from error


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
