"""One node's side of the hub: attends it, starts ranks as it says, and tells how they end."""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc

from meshwright.launch.groups import Node
from meshwright.launch.hub import BEAT_SECONDS
from meshwright.launch.messages import Dial, RankPlace
from meshwright.launch.private_folder import private_folder
from meshwright.launch.processes import POLL_SECONDS, RankEnd, RankProcesses, RankStart, log_name
from meshwright.launch.sent_logs import SentLogs
from meshwright.launch.service import connect
from meshwright.launch.versions import Versions
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubStub
from meshwright.launch.wire_values import wire_node

#: How long an agent goes on without a word of the hub. With the grace below, ranks have ended 10 s after the hub has.
PATIENCE_SECONDS = 6.0
LOST_GRACE_SECONDS = 2.0
RETRY_SECONDS = 0.5
#: Time for the last words of an agent that leaves to arrive.
TOLD_SECONDS = 2.0
#: Of the folder that a node which does not see the run folder keeps copies in.
COPIES_PREFIX = "meshwright-copies-"


@dataclass(frozen=True)
class Outcome:
    """Why an agent has ended: "done", "refused" (by the hub, see `words`), "given up" (by the hub, after its silence),
    "lost" (the hub is silent), "left" (the node ends)."""

    kind: str
    words: str = ""


class Agent:
    """One node's side of the hub that `dial` names. `run` belongs to one thread, which starts the ranks.

    `find` reads the secret and address again where the hub refuses the secret, which may have been replaced while this
    agent was out of reach (default: `dial` is all there is).
    """

    def __init__(
        self,
        dial: Dial,
        node: Node,
        versions: Versions,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        find: Callable[[], Dial | None] | None = None,
        reach_seconds: float | None = None,
    ) -> None:
        """reach_seconds: how long it tries to reach the hub first (default: `patience_seconds`)."""
        self._dial, self._node, self._versions = dial, node, versions
        self._find = find or (lambda: dial)
        self._own_patience_seconds = patience_seconds
        self._patience_seconds = patience_seconds if reach_seconds is None else reach_seconds
        self._ticket = secrets.token_hex(16)
        self._inbox: queue.SimpleQueue[wire.HubMessage | Callable[[], None]] = queue.SimpleQueue()
        self._connection: _Connection | None = None
        self._ranks: RankProcesses | None = None
        self._generation = 0
        self._reports: list[wire.AgentMessage] = []  # of this generation, told again after a reconnection
        self._heard = self._beat = self._tried = self._told = time.monotonic()
        self._leave_at = float("inf")
        self._outcome: Outcome | None = None
        #: Whether a hub has welcomed it.
        self.attended = False
        self._welcomed = False  # by the hub, on this connection: before, what is sent may be lost
        self._beats = 0
        self._logs: SentLogs | None = None  # None: the disk is shared
        self._shared_folder = True
        self._closing = ExitStack()

    def run(self) -> Outcome:
        """Attends until the job is over, the hub is silent or refuses this node, or `leave` was called."""
        try:
            while self._outcome is None:
                with contextlib.suppress(queue.Empty):
                    self._obey(self._inbox.get(timeout=POLL_SECONDS))
                self._report_ends()
                self._leave_in_time()
                self._stay_in_touch()
            return self._outcome
        finally:
            if self._ranks is not None:
                self._end_ranks()
            if self._connection is not None:
                self._connection.close()
            self._closing.close()

    def leave(self, seconds: float) -> None:
        """Tells the hub that the node ends in `seconds`, and asks the ranks to save. From any thread or a signal."""
        self._inbox.put(lambda: self._leave(seconds))

    def _leave(self, seconds: float) -> None:
        self._told = time.monotonic()
        self._leave_at = time.monotonic() + seconds
        self._send(wire.AgentMessage(leaving_seconds=seconds))
        if self._ranks is not None:
            self._ranks.ask_to_save()

    def _leave_in_time(self) -> None:
        """Ends this agent once its ranks have, or when the node's time is up."""
        now = time.monotonic()
        running = self._ranks is not None and bool(self._ranks.running)
        told = (self._welcomed or not self._reports) and now - self._told > TOLD_SECONDS
        if now > self._leave_at or (self._leave_at < float("inf") and not running and told):
            self._outcome = Outcome("left")

    def _end_ranks(self) -> None:
        """SIGTERM, a short grace, SIGKILL."""
        assert self._ranks is not None
        self._ranks.end("", LOST_GRACE_SECONDS if self._outcome and self._outcome.kind == "lost" else 0.0)
        while self._ranks.running:
            self._ranks.poll()
            time.sleep(POLL_SECONDS)
        self._ranks.kill()

    def _stay_in_touch(self) -> None:
        now = time.monotonic()
        connection = self._connection
        if connection is not None:
            self._heard = max(self._heard, connection.heard)
            if self._welcomed and now - self._beat >= BEAT_SECONDS:
                self._beat = now
                self._send_logs()
                self._beats += 1
                if self._logs is not None:
                    self._logs.beat(self._beats)
                self._send(wire.AgentMessage(beat=wire.Beat(number=self._beats)))
        if now - self._heard > self._patience_seconds:
            self._outcome = Outcome("lost", f"the hub has been silent for {self._patience_seconds:g} s")
        elif (connection is None or connection.ended) and now - self._tried >= RETRY_SECONDS * (connection is not None):
            if connection is not None:
                connection.close()
                found = self._find() if connection.refused else None
                if connection.refused and (found is None or found.secret == connection.secret):
                    self._outcome = Outcome("refused", connection.refused)
                    return
                self._take_dial(found or self._dial)
            self._tried, self._welcomed = now, False
            self._connection = _Connection(self._dial, self._hello(), self._inbox.put)

    def _hello(self) -> wire.AgentMessage:
        running = self._ranks.running if self._ranks is not None else []
        versions = self._versions
        hello = wire.Hello(
            node=wire_node(self._node),
            code_digest=versions.code_digest,
            torch_version=versions.torch,
            python_version=versions.python,
            ticket=self._ticket,
            generation=self._generation if self._reports else 0,
            ranks=[wire.RankName(role=place.role, rank=place.rank) for place in running],
        )
        return wire.AgentMessage(hello=hello)

    def _send(self, message: wire.AgentMessage) -> None:
        if self._connection is not None and self._welcomed:
            self._connection.send(message)

    def _send_again(self) -> None:
        """Tells a hub that has just welcomed this agent what it may not have heard: logs before the ends of ranks."""
        if self._logs is not None:
            self._logs.go_back()
            self._send_logs()
        if self._leave_at < float("inf"):
            self._told = time.monotonic()
            self._send(wire.AgentMessage(leaving_seconds=max(0.0, self._leave_at - self._told)))
        for report in self._reports:
            self._send(report)

    def _obey(self, message: wire.HubMessage | Callable[[], None]) -> None:
        if not isinstance(message, wire.HubMessage):
            message()
            return
        kind = message.WhichOneof("what")
        if kind == "start":
            self._start(message.start)
        elif kind == "stop" and self._ranks is not None and message.stop.generation == self._generation:
            self._ranks.end(message.stop.role, message.stop.grace_seconds)
        elif kind == "welcome":
            self.attended = self._welcomed = True
            self._patience_seconds = message.welcome.patience_seconds or self._own_patience_seconds
            self._shared_folder = _holds(message.welcome.folder_mark_path, message.welcome.folder_mark)
            self._send_again()
        elif kind == "beat" and self._logs is not None:
            self._logs.answered(message.beat.number)
        elif kind == "secret":
            self._take_dial(replace(self._dial, secret=message.secret))
        elif kind == "refused":
            self._outcome = Outcome("refused", message.refused)
        elif kind == "given_up":
            self._outcome = Outcome("given up", message.given_up)
        elif kind == "done":
            self._outcome = Outcome("done")

    def _take_dial(self, dial: Dial) -> None:
        if dial.secret != self._dial.secret and self._ranks is not None:
            self._ranks.hand(dial.secret)
        self._dial = dial

    def _start(self, start: wire.Start) -> None:
        if start.generation <= self._generation:
            return  # told again after a reconnection
        if self._ranks is not None:
            self._ranks.kill()  # of an older generation: whoever is left of it cannot be of use
        self._generation, self._reports = start.generation, []
        folder, copies = Path(start.folder), ""
        if not self._shared_folder:
            try:
                folder, copies = self._copies / "logs", str(self._copies)
            except OSError as error:
                self._outcome = Outcome("refused", f"no folder for copies of what is in the run folder: {error}")
                return
        starts = [
            self._rank_start(role, rank, start.generation, folder, copies)
            for role in start.roles
            for rank in role.ranks
        ]
        logs = {(one.place.role, one.place.rank): folder / log_name(one.place.role, one.place.rank) for one in starts}
        self._logs = None if self._shared_folder else SentLogs(logs)
        try:
            self._ranks = RankProcesses(starts, folder, self._node.interface)
        except (OSError, ValueError) as error:
            self._ranks = None
            for one in starts:
                self._report(one.place, kind="cannot-start", message=f"cannot start a process: {error}")
            return
        pids, sees = self._ranks.pids, self._shared_folder
        started = wire.Started(generation=start.generation, pids=pids, sees_run_folder=sees)
        self._reports.append(wire.AgentMessage(started=started))
        self._send(self._reports[-1])

    @cached_property
    def _copies(self) -> Path:
        """A folder of this node's own, for logs and for copies of what is in the run folder."""
        return self._closing.enter_context(private_folder(COPIES_PREFIX, Path(tempfile.gettempdir())))

    def _rank_start(
        self, role: wire.RoleSpec, rank: wire.RankSpec, generation: int, folder: Path, copies: str
    ) -> RankStart:
        number, local, device, node = rank.name.rank, rank.local_rank, rank.device, self._node.name
        place = RankPlace(role.role, number, rank.world, local, device, generation, folder, self._dial, node, copies)
        return RankStart(place, role.function, json.loads(role.payload), dict(role.environment), role.keep_memory)

    def _report_ends(self) -> None:
        for end in self._ranks.poll() if self._ranks is not None else ():
            self._send_logs()
            self._report_end(end)

    def _report_end(self, end: RankEnd) -> None:
        fields: dict[str, Any] = {"kind": end.kind, "message": end.message, "log_tail": end.log_tail}
        if not end.kind:
            fields["result"] = end.answer["result"].encode()
        elif "error" in end.answer:
            fields["error"] = json.dumps(end.answer["error"]).encode()
        if "at" in end.answer:
            fields["seconds_ago"] = max(0.0, time.time() - end.answer["at"])
        self._report(end.place, **fields)

    def _report(self, place: RankPlace, **fields: Any) -> None:
        name = wire.RankName(role=place.role, rank=place.rank)
        ended = wire.RankEnded(name=name, generation=self._generation, **fields)
        self._told = time.monotonic()
        self._reports.append(wire.AgentMessage(ended=ended))
        self._send(self._reports[-1])

    def _send_logs(self) -> None:
        """Sends what ranks have written since the last time, where the driver cannot read it."""
        if self._logs is not None and self._welcomed:
            for log in self._logs.unsent():
                self._send(wire.AgentMessage(log=log))


class _Connection:
    """One stream to the hub. What arrives goes to `receive`; `ended` once it is over, `refused` with why if so."""

    def __init__(self, dial: Dial, hello: wire.AgentMessage, receive: Callable[[wire.HubMessage], None]) -> None:
        self.heard, self.ended, self.refused, self.secret = 0.0, False, "", dial.secret
        self._outbox: queue.SimpleQueue[wire.AgentMessage | None] = queue.SimpleQueue()
        self._outbox.put(hello)
        self._receive = receive
        self._channel = connect(dial.address, dial.certificate)
        messages = iter(self._outbox.get, None)
        self._call = HubStub(self._channel).Attend(messages, metadata=[("secret", dial.secret)])
        threading.Thread(target=self._listen, name="meshwright-agent-hear", daemon=True).start()

    def send(self, message: wire.AgentMessage) -> None:
        self._outbox.put(message)

    def _listen(self) -> None:
        try:
            for message in self._call:
                self.heard = time.monotonic()
                self._receive(message)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                self.refused = error.details()
        finally:
            self.ended = True

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()


def _holds(path: str, content: str) -> bool:
    """Whether the file at `path` is there and holds `content`; True where no file is named."""
    try:
        return not path or Path(path).read_text() == content
    except OSError:
        return False
