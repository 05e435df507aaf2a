"""The driver of a job: generations of ranks behind one hub, until one returns or its caller gives up."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from meshwright.errors import CannotWork, MeshwrightError, Problem, RunFailed
from meshwright.launch.cluster_backend import ClusterBackend
from meshwright.launch.generation import Generation
from meshwright.launch.groups import Need, Node, Place, RankGroup, nodes_in_words, place
from meshwright.launch.hub_files import Before, HubFiles
from meshwright.launch.messages import (
    Ask,
    CallResult,
    Event,
    Failure,
    Finished,
    Message,
    NodeJoined,
    NodeLeaving,
    NodeLost,
    NodeRefused,
    StopAsked,
    Wait,
    Waited,
    first,
)
from meshwright.launch.processes import log_name

log = logging.getLogger("meshwright")

#: The longest grace of ranks whose group has failed: they cannot go on.
FAILED_GRACE_SECONDS = 1.0
#: A lost node is left out for so long, unless its agent attends again.
LOST_SECONDS = 60.0
#: How often the cluster is asked for nodes that are new, and whose agents do not come by themselves.
LOOK_SECONDS = 2.0


class Launch:
    """Keeps the groups that `ask` wants at work on the nodes of `backend`. As a context manager it ends them at exit.

    `ask` is called in a thread of its own: at the start, when nodes join, leave or are lost, when a group fails, and
    when all ranks have returned. Where it then wants other groups, the ranks are asked to end (they save), and a new
    generation starts. `folder` gets the ranks' logs, `hub_folder` the files by which agents and people find the hub.
    `on_message` takes what ranks tell. `on_start` is called before ranks are started, with their groups, and returns
    the number of the generation, above that of all before (default: the next number). `on_stop` is called where a
    person asks the job to end, and then has it end in its own way (default: as `stop`).

    Where `hub_folder` is that of a driver which was killed and whose agents live on, their ranks are taken over, and
    `on_adopt` is told; agents wait for that for `patience_seconds` (0: as they were told at their start). Raises
    CannotWork where the first groups cannot be placed, RunFailed where a rank cannot be started, InputError where the
    hub cannot listen.
    """

    def __init__(
        self,
        backend: ClusterBackend,
        ask: Ask,
        folder: Path,
        *,
        hub_folder: Path | None = None,
        grace_seconds: float = 5.0,
        start_seconds: float = 60.0,
        on_message: Callable[[Message], None] | None = None,
        on_start: Callable[[Sequence[RankGroup]], int] | None = None,
        on_adopt: Callable[[Before], None] | None = None,
        on_stop: Callable[[], object] | None = None,
        patience_seconds: float = 0.0,
    ) -> None:
        self._backend, self._ask, self._folder = backend, ask, folder
        self._grace_seconds, self._start_seconds = grace_seconds, start_seconds
        self._on_message, self._on_start, self._on_adopt = on_message, on_start, on_adopt
        self._on_stop = on_stop
        self._begun = threading.Event()
        self._stop_asked = False
        self._lost: dict[str, float] = {}  # node -> when it was lost
        self._wait_until: float | None = None
        self._looked = time.monotonic()
        self._leaving: set[str] = set()  # nodes that the cluster said will end
        self._known: set[str] = set()  # nodes that were there when groups were last asked for
        self._call_results: queue.SimpleQueue[CallResult] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._results: list[Any] | None = None
        self._groups: Sequence[RankGroup] = ()
        self._files = HubFiles(hub_folder, backend.listen(), patience_seconds)
        try:
            self.hub = self._files.hub
            backend.open(self._files)
        except BaseException:
            self._files.close()
            raise
        self._thread = threading.Thread(target=self._run, name="meshwright-launch", daemon=True)
        self._thread.start()
        try:
            self._begun.wait()
        except BaseException:  # Ctrl-C
            self.stop()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def poll(self) -> str:
        """ "running", "done", "failed" or "stopped"."""
        if self._thread.is_alive():
            return "running"
        return "failed" if self._error else "stopped" if self._results is None else "done"

    def wait(self, timeout_seconds: float | None = None) -> list[Any]:
        """Results, group by group and by rank, once the job is done. Raises the error of the rank that failed first.

        A MeshwrightError keeps its class; any other end (an exception, a signal, an exit without a result) is RunFailed
        and names the rank. Raises TimeoutError after `timeout_seconds` with the ranks still running, and RunFailed
        if `stop` ended one before it returned.
        """
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._functions()} still runs after {timeout_seconds} s")
        if self._error:
            raise self._error
        if self._results is None:
            raise RunFailed(Problem("launch", f"{self._functions()} was stopped before it ended"))
        return self._results

    def stop(self) -> None:
        """Send SIGTERM to every rank, and SIGKILL after the grace time. Returns when all have ended."""
        self.hub.ask_stop()
        self._thread.join()

    def call(self, role: str, rank: int, name: str, body: Any = None, blob: bytes = b"") -> int:
        """Calls `name` in a rank (`Context.calls`). The CallResult with the id returned comes from `call_result`."""
        return self.hub.call(role, rank, name, body, blob)

    def call_result(self, timeout_seconds: float | None = None) -> CallResult:
        """The next answer of a rank; a rank that ends answers by an error. Raises TimeoutError."""
        try:
            return self._call_results.get(timeout=timeout_seconds)
        except queue.Empty:
            raise TimeoutError(f"no rank has answered within {timeout_seconds} s") from None

    def log(self, rank: int, role: str = "rank") -> Path:
        """The file with stdout and stderr of a rank."""
        return self._folder / log_name(role, rank)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks on their nodes, group by group and by rank."""
        return tuple(self.hub.pids().values())

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # The thread

    def _functions(self) -> str:
        return ", ".join(group.function for group in self._groups) or "the job"

    def _run(self) -> None:
        try:
            self._results = self._generations()
        except BaseException as error:  # raised by the caller's thread, which waits for an answer
            self._error = error
            self._end_ranks()
        finally:
            for close in (self._files.close, self._backend.close):
                try:
                    close()
                except BaseException as error:
                    self._error = self._error or error
            self._begun.set()

    def _generations(self) -> list[Any] | None:
        """Starts generations until one returns; None where the job was stopped before."""
        event: Event | Finished | Waited | None = None
        if self._files.before is not None:
            event = self._adopt(self._files.before)
        while not self._stop_asked:
            nodes = self._nodes()
            groups = self._wanted(event, nodes)
            if isinstance(groups, Wait):
                event = self._wait(groups)
                continue
            if groups is None and self._groups and isinstance(event, NodeJoined | NodeLeaving | NodeLost):
                groups = self._groups
            if groups is None:
                if isinstance(event, Finished):
                    return event.results
                raise self._error_of(event)
            self._groups = groups
            with self._run_failed_once_begun():
                places = self._places(groups, nodes)
            event = places if isinstance(places, NodeLost | StopAsked) else self._one_generation(groups, places)
        return event.results if isinstance(event, Finished) else None

    def _wanted(
        self, event: Event | Finished | Waited | None, nodes: Sequence[Node]
    ) -> Sequence[RankGroup] | Wait | None:
        with self._run_failed_once_begun():
            return self._ask(event, nodes)

    @contextlib.contextmanager
    def _run_failed_once_begun(self) -> Iterator[None]:
        """Makes a CannotWork of a job that has been at work RunFailed: what it can be resumed from is there."""
        try:
            yield
        except CannotWork as error:
            if not self._begun.is_set():
                raise
            raise RunFailed(error.problems) from error

    def _wait(self, wait: Wait) -> Event | Waited:
        """The next event that concerns nodes, StopAsked, or Waited once `wait` is over."""
        if self._wait_until is None:
            self._wait_until = time.monotonic() + wait.seconds
        before = {node.name for node in self._nodes()}
        while (left := self._wait_until - time.monotonic()) > 0:
            event = self.hub.event(min(left, LOOK_SECONDS))
            if isinstance(event, StopAsked):
                self._stop_asked = True
                return event
            if isinstance(event, NodeRefused):
                raise CannotWork(Problem("launch", event.reason))
            if isinstance(event, NodeLost):
                self._lost[event.node.name] = time.monotonic()
            if isinstance(event, NodeJoined | NodeLeaving | NodeLost):
                return event
            if new := [node for node in self._nodes() if node.name not in before]:
                return NodeJoined(new[0])
        return Waited()

    def _nodes(self) -> Sequence[Node]:
        """The nodes there are, less those that were lost a moment ago: their cluster may not know yet."""
        attending = self.hub.nodes()
        names, recently = {node.name for node in attending}, time.monotonic() - LOST_SECONDS
        lost = {name for name, when in self._lost.items() if when > recently and name not in names}
        return [node for node in self._backend.nodes(attending) if node.name not in lost]

    def _places(self, groups: Sequence[RankGroup], asked: Sequence[Node]) -> Sequence[Place] | NodeLost | StopAsked:
        """The places of all ranks, on nodes whose agents attend. Where that fails because a node is gone since the
        nodes `asked`, for which the groups were wanted: that node."""
        self._wait_until = None
        nodes = self._nodes()
        try:
            places = place(groups, nodes)
            if not self._await_agents(groups, places):
                return StopAsked()
        except CannotWork:
            staying = {node.name for node in self._nodes() if node.leaving_seconds is None}
            gone = [node for node in asked if node.leaving_seconds is None and node.name not in staying]
            if not gone:
                raise
            return NodeLost(gone[0], "unreachable", f"node {gone[0].name} went before its ranks were started")
        self._known = {node.name for node in nodes}
        return places

    def _one_generation(self, groups: Sequence[RankGroup], places: Sequence[Place]) -> Event | Finished:
        """Starts `groups` and follows them to their end. Returns why: Finished, StopAsked, the first Failure, or what
        happened to the nodes for which `ask` wants other groups."""
        generation = Generation(groups, places)
        number = self._on_start(groups) if self._on_start is not None else self.hub.generation + 1
        self._files.begin(number, groups, places, self._folder)
        return self._follow(generation)

    def _adopt(self, before: Before) -> Event | Finished:
        """Follows the ranks of a hub that was killed: their agents come back, or are lost."""
        self._groups = before.groups
        self._known = {place.node for place in before.places}
        if self._on_adopt is not None:
            self._on_adopt(before)
        generation = Generation(before.groups, before.places)
        return self._follow(generation)

    def _follow(self, generation: Generation) -> Event | Finished:
        """Handles events until the last rank of `generation` has ended; returns why, as `_one_generation`."""
        cause: Event | None = None
        while not generation.over:
            for role in generation.roles_to_end():
                self.hub.end_ranks(role, min(FAILED_GRACE_SECONDS, self._grace_seconds))
            event = self._change() or self.hub.event(generation.patience_seconds())
            if event is not None:
                cause = self._take(event, generation, cause)
            if generation.begun:
                self._begun.set()
        if generation.returned:
            return cause if cause is not None and not self._stop_asked else Finished(generation.results())
        return first(generation.failures) if generation.failures else cause or StopAsked()

    def _change(self) -> NodeJoined | NodeLeaving | None:
        """A node that the cluster has now, or that it says will end, of which no agent has told. Looked for every
        LOOK_SECONDS."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        nodes = self._nodes()
        self._leaving &= {node.name for node in nodes if node.leaving_seconds is not None}
        for node in nodes:
            if node.leaving_seconds is not None and node.name not in self._leaving:
                self._leaving.add(node.name)
                return NodeLeaving(node)
        new = [node for node in nodes if node.name not in self._known]
        self._known.update(node.name for node in new)
        return NodeJoined(new[0]) if new else None

    def _take(self, event: Event, generation: Generation, cause: Event | None) -> Event | None:
        """Handles an event; returns why the generation ends, None while it goes on."""
        generation.take(event)
        if isinstance(event, NodeLost):
            self._lost[event.node.name] = time.monotonic()
        if isinstance(event, Message):
            self._receive(event)
        elif isinstance(event, CallResult):
            self._call_results.put(event)
        elif isinstance(event, StopAsked) and event.by_person and self._on_stop is not None:
            self._on_stop()
        elif isinstance(event, StopAsked):
            self._stop_asked = True
            self.hub.end_ranks("", self._grace_seconds)
        elif isinstance(event, NodeJoined | NodeLeaving | NodeLost) and cause is None and not generation.failures:
            if isinstance(event, NodeLost) and event.node.name in generation.nodes:
                return cause  # the failures of its ranks follow
            wanted = self._wanted(event, self._nodes())
            hit = isinstance(event, NodeLeaving) and event.node.name in generation.nodes
            other = wanted is not None and wanted != list(generation.groups)
            if hit or other:
                self.hub.end_ranks("", self._grace_seconds)  # all save and return, while the node lasts
                return event if wanted is not None else cause
        elif isinstance(event, NodeRefused):
            log.warning("%s", event.reason)
        return cause

    def _receive(self, message: Message) -> None:
        if message.kind == "log":  # of a node that does not share the disk
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self.log(message.rank, message.role), "ab") as file:
                file.write(message.blob)
        elif self._on_message is not None:
            self._on_message(message)

    def _await_agents(self, groups: Sequence[RankGroup], places: Sequence[Place]) -> bool:
        """Has agents run on the nodes of `places`, and waits for their hello; False where the job was stopped."""
        needs = {group.role: group.need for group in groups}
        wanted: dict[str, list[Need]] = {}
        for one in places:
            wanted.setdefault(one.node, []).append(needs[one.role])
        self._backend.agents(wanted)
        names = list(wanted)
        deadline = time.monotonic() + self._start_seconds
        while missing := set(names) - {node.name for node in self.hub.nodes()}:
            event = self.hub.event(max(0.0, deadline - time.monotonic()))
            if isinstance(event, NodeRefused) and event.node.name in missing:
                raise CannotWork(Problem("launch", event.reason))
            if isinstance(event, NodeLost):
                self._lost[event.node.name] = time.monotonic()
                if event.node.name in names:
                    raise CannotWork(Problem("launch", event.reason))
            if isinstance(event, StopAsked):
                self._stop_asked = True
                return False
            if event is None:
                what = f"no word from {', '.join(sorted(missing))} within {self._start_seconds:g} s"
                raise CannotWork(Problem("launch", what, f"there are {nodes_in_words(self.hub.nodes())}"))
        return True

    def _end_ranks(self) -> None:
        """Has the ranks that run end in order, after an error of the driver's own."""
        self.hub.end_ranks("", self._grace_seconds)
        deadline = time.monotonic() + self._grace_seconds + FAILED_GRACE_SECONDS
        while self.hub.running() and time.monotonic() < deadline:
            event = self.hub.event(FAILED_GRACE_SECONDS)
            if isinstance(event, Message):
                with contextlib.suppress(OSError, MeshwrightError):  # as of a full disk, which is raised already
                    self._receive(event)

    def _error_of(self, event: Event | Finished | Waited | None) -> MeshwrightError:
        """The error for an event after which the caller gives up."""
        if isinstance(event, Failure):
            return event.error or RunFailed(self._problem(event))
        reason = "no groups of ranks to start"
        if isinstance(event, NodeLost):
            reason = event.reason
        elif isinstance(event, NodeLeaving):
            reason = f"node {event.node.name} ends, and no other is left"
        return RunFailed(Problem("launch", reason))

    def _problem(self, failure: Failure) -> Problem:
        group = next(group for group in self._groups if group.role == failure.role)
        what = failure.message
        if failure.log_tail:
            what += "; the end of its log:\n    " + failure.log_tail.replace("\n", "\n    ") + "\n"
        where = f"{failure.role} {failure.rank} of {group.ranks}"
        if len({place.node for place in self._files.places}) > 1:
            where += f" on {failure.node}"
        return Problem(where, what, f"whole log: {self.log(failure.rank, failure.role)}")


def keep(backend: ClusterBackend, ask: Ask, folder: Path | str, **options: Any) -> Launch:
    """A Launch that asks `ask` on every event which groups it wants; `options` are those of Launch."""
    return Launch(backend, ask, Path(folder), **options)


def start(backend: ClusterBackend, groups: Sequence[RankGroup], folder: Path | str, **options: Any) -> Launch:
    """A Launch of `groups` that gives up at the first failure."""
    return Launch(backend, lambda event, _: groups if event is None else None, Path(folder), **options)
