"""The hub of a job: agents attend it, ranks meet through its keys, and it tells the driver what happens, in order.

It places, limits and replaces nothing: that is the work of what starts the agents. Every call needs the secret of its
scope (`access`), a rank's also the current generation: what comes from an older one is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meshwright.launch.access import Access
from meshwright.launch.groups import Node, Place, RankGroup
from meshwright.launch.keys import KeyTable
from meshwright.launch.messages import (
    CallResult,
    Event,
    Failure,
    Message,
    NodeJoined,
    NodeLeaving,
    NodeLost,
    NodeRefused,
    RanksBegun,
    RankStopped,
    Returned,
    StopAsked,
    error_from_dict,
)
from meshwright.launch.versions import Versions, difference
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire_values import node_of, role_spec, wire_node

BEAT_SECONDS = 1.0
#: A node that has not been heard of for so long is lost. A beat is a thread's that does nothing else.
SILENT_SECONDS = 5.0
CHECK_SECONDS = 0.25
#: The most that a call to a rank may take with its name: what gRPC lets pass is the hub's and the ranks' limit.
MAX_CALL_BYTES = (64 << 20) - 1024
RankKey = tuple[str, int]


@dataclass
class Member:
    """An agent that attends, or that may come back: its connection broke less than SILENT_SECONDS ago."""

    node: Node
    ticket: str
    heard: float
    outbox: queue.SimpleQueue[wire.HubMessage | None] = field(default_factory=queue.SimpleQueue)
    connected: bool = True
    connection: int = 0
    orders: list[wire.HubMessage] = field(default_factory=list)  # of this generation

    def order(self, order: wire.HubMessage) -> None:
        self.orders.append(order)
        self.outbox.put(order)


#: A member, the number of its connection, and what is to be sent there.
Admitted = tuple[Member, int, "queue.SimpleQueue[wire.HubMessage | None]"]


@dataclass
class _Rank:
    place: Place
    state: str = "running"  # done, stopped, failed
    pid: int = 0


class Hub:
    """The members, ranks and keys of a job; `service` lets others reach it.

    `mark` is (path, content) of a file in the run folder, by which agents see whether they share its disk. Agents let
    ranks go on for `patience_seconds` without a word of the hub (0: as they were told at their start).

    `event` returns what happened; `begin` starts a generation. All methods may be called from any thread.
    """

    def __init__(
        self,
        access: Access,
        versions: Versions,
        mark: tuple[str, str] = ("", ""),
        patience_seconds: float = 0.0,
    ) -> None:
        self.access, self._versions = access, versions
        self._welcome = wire.Welcome(folder_mark_path=mark[0], folder_mark=mark[1], patience_seconds=patience_seconds)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._members: dict[str, Member] = {}
        self._lost_tickets: set[str] = set()
        self._ranks: dict[RankKey, _Rank] = {}
        self._failures: list[str] = []
        self._keys = KeyTable()
        self._told: dict[RankKey, int] = {}  # the number of what each rank told last
        self._logged: dict[RankKey, int] = {}  # where in its agent's file the log goes on
        self._calls: dict[RankKey, queue.SimpleQueue[wire.Call | None]] = {}  # to ranks that listen
        self._open_calls: dict[int, tuple[RankKey, wire.Call]] = {}
        self._call_ids = itertools.count(time.time_ns())  # above those of a hub that was killed
        self._connections = itertools.count(1)
        self._began = time.monotonic()
        self._over = threading.Event()
        self.generation = 0
        threading.Thread(target=self._watch, name="meshwright-hub-watch", daemon=True).start()

    def event(self, timeout_seconds: float | None = None) -> Event | None:
        """The next event, None after `timeout_seconds` without one."""
        with contextlib.suppress(queue.Empty):
            return self._events.get(timeout=timeout_seconds)
        return None

    def nodes(self) -> tuple[Node, ...]:
        """The nodes whose agents attend, in the order in which they joined."""
        with self._lock:
            return tuple(member.node for member in self._members.values())

    def tickets(self) -> dict[str, str]:
        """Node -> the ticket of its agent."""
        with self._lock:
            return {name: member.ticket for name, member in self._members.items()}

    def begin(self, generation: int, groups: Sequence[RankGroup], places: Sequence[Place], folder: str) -> None:
        """Starts the ranks of `generation`, a number above the last, on nodes that attend. Keys, calls and ranks of the
        one before are over."""
        with self._lock:
            self._take_generation(generation, places)
            for node, member in self._members.items():
                member.orders.clear()
                here = [place for place in places if place.node == node]
                if here:
                    roles = [role_spec(group, here) for group in groups]
                    message = wire.Start(
                        generation=self.generation, roles=[role for role in roles if role.ranks], folder=folder
                    )
                    member.order(wire.HubMessage(start=message))
            for place in places:
                if place.node not in self._members:
                    self._fail((place.role, place.rank), place.node, "unreachable", f"its node {place.node} is gone")

    def adopt(
        self, generation: int, places: Sequence[Place], nodes: Sequence[Node], tickets: Mapping[str, str]
    ) -> None:
        """Takes `generation`, which an earlier hub began, as the current one: its agents, known by their tickets, come
        back by themselves, or are lost after SILENT_SECONDS."""
        with self._lock:
            self._take_generation(generation, places)
            now = time.monotonic()
            for node in nodes:
                self._members[node.name] = Member(node, tickets.get(node.name, ""), now, connected=False)

    def _take_generation(self, generation: int, places: Sequence[Place]) -> None:
        self.generation = generation
        self._keys.clear(generation)
        self._ranks = {(place.role, place.rank): _Rank(place) for place in places}
        for calls in self._calls.values():
            calls.put(None)
        self._calls, self._told, self._logged = {}, {}, {}
        self._open_calls.clear()

    def end_ranks(self, role: str, grace_seconds: float) -> None:
        """Has agents end the ranks of `role` ("": all) of this generation: SIGTERM, after the grace SIGKILL."""
        with self._lock:
            message = wire.StopRanks(generation=self.generation, role=role, grace_seconds=grace_seconds)
            for member in self._members.values():
                member.order(wire.HubMessage(stop=message))

    def dismiss(self, node: str) -> None:
        """Tells the agent of `node`, which runs no rank, that it is not needed, and forgets it."""
        with self._lock:
            member = self._members.pop(node, None)
            if member is not None:
                self._lost_tickets.add(member.ticket)
                member.outbox.put(wire.HubMessage(done=wire.Received()))
                member.outbox.put(None)

    def running(self, role: str = "") -> list[RankKey]:
        """The ranks of `role` ("": all) that have not ended."""
        with self._lock:
            return [key for key, rank in self._ranks.items() if rank.state == "running" and role in ("", key[0])]

    def pids(self) -> dict[RankKey, int]:
        """The process ids of the ranks on their nodes; 0 where the agent has not said."""
        with self._lock:
            return {key: rank.pid for key, rank in self._ranks.items()}

    def call(self, role: str, rank: int, name: str, body: Any = None, blob: bytes = b"") -> int:
        """Calls `name` in a rank; the CallResult with the id returned is an event. A rank that ends answers by an
        error. Raises ValueError where body and blob have more than MAX_CALL_BYTES."""
        call = wire.Call(name=name, body=json.dumps(body).encode(), blob=blob)
        if call.ByteSize() > MAX_CALL_BYTES:
            raise ValueError(f"the call {name!r} has {call.ByteSize()} bytes, more than the {MAX_CALL_BYTES} allowed")
        with self._lock:
            call.id = next(self._call_ids)
            if (role, rank) not in self.running():
                self._events.put(CallResult(call.id, role, rank, None, b"", "the rank does not run"))
                return call.id
            self._open_calls[call.id] = ((role, rank), call)
            if (role, rank) in self._calls:
                self._calls[role, rank].put(call)
            return call.id

    def renew(self, access: Access) -> None:
        """Takes new secrets: agents that attend are told theirs, the old ones are refused from now on."""
        with self._lock:
            self.access = access
            for member in self._members.values():
                member.outbox.put(wire.HubMessage(secret=access.join))

    def end(self) -> None:
        """Tells all agents that the job is over."""
        with self._lock:
            for member in self._members.values():
                member.outbox.put(wire.HubMessage(done=wire.Received()))
                member.outbox.put(None)
        self._over.set()

    # What the service calls

    def admit(self, hello: wire.Hello) -> Admitted | wire.HubMessage:
        """The member that `hello` is of, with its new connection, or the refusal."""
        node = node_of(hello.node)
        if words := difference(self._versions, Versions(hello.code_digest, hello.torch_version, hello.python_version)):
            reason = f"node {node.name}: {words}"
            self._events.put(NodeRefused(node, reason))
            return wire.HubMessage(refused=reason)
        with self._lock:
            now = time.monotonic()
            if hello.ticket in self._lost_tickets:
                return wire.HubMessage(given_up=f"the hub gave this node up after {SILENT_SECONDS:g} s of silence")
            known = self._members.get(node.name)
            if known is not None and not self._may_come_back(known, hello, now):
                return wire.HubMessage(refused=f"node {node.name}: an agent of that name attends already")
            if known is None and hello.generation not in (0, self.generation):
                return wire.HubMessage(given_up=f"the ranks are of generation {hello.generation}, which is over")
            member = known or Member(node, hello.ticket, now)
            if known is not None:
                leaving = known.node.leaving_seconds
                known.connected, known.heard, known.node = True, now, replace(node, leaving_seconds=leaving)
                known.outbox.put(None)
                known.outbox = queue.SimpleQueue()
                for order in known.orders:  # what was sent while the connection broke may be lost
                    known.outbox.put(order)
            member.connection = next(self._connections)
            self._members[node.name] = member
            if known is None:
                self._events.put(NodeJoined(node))
            return member, member.connection, member.outbox

    def _may_come_back(self, known: Member, hello: wire.Hello, now: float) -> bool:
        return known.ticket == hello.ticket and (not known.connected or now - known.heard > 2 * BEAT_SECONDS)

    def hear(self, member: Member, message: wire.AgentMessage) -> None:
        """What an agent says after its hello."""
        kind = message.WhichOneof("what")
        with self._lock:
            if self._members.get(member.node.name) is not member:
                return  # it was given up
            member.heard = time.monotonic()
            if kind == "ended" and message.ended.generation == self.generation:
                self._end_rank(message.ended, member.node)
            elif kind == "started" and message.started.generation == self.generation:
                here = [rank for rank in self._ranks.values() if rank.place.node == member.node.name]
                if not message.started.sees_run_folder and here and not here[0].pid:  # not told again
                    place = here[0].place
                    self._events.put(Message(place.role, place.rank, "without-disk", {"node": place.node}, b""))
                for rank, pid in zip(here, message.started.pids, strict=False):
                    rank.pid = pid
                self._events.put(RanksBegun(member.node.name))
            elif kind == "leaving_seconds":
                before, member.node = member.node, replace(member.node, leaving_seconds=message.leaving_seconds)
                if before.leaving_seconds is None:  # not told again
                    self._events.put(NodeLeaving(member.node))
            elif kind == "log":
                self._take_log(message.log, member.node)
            elif kind == "beat":
                member.outbox.put(wire.HubMessage(beat=message.beat))

    def _take_log(self, log: wire.Log, node: Node) -> None:
        """Takes what an agent sends of a log, less what has come already."""
        key = (log.name.role, log.name.rank)
        if key in self._ranks and self._ranks[key].place.node == node.name:
            taken = self._logged.get(key, log.offset)
            self._logged[key] = max(taken, log.offset + len(log.text))
            if text := log.text[max(0, taken - log.offset) :]:
                self._events.put(Message(*key, "log", None, text))

    def _end_rank(self, ended: wire.RankEnded, node: Node) -> None:
        key = (ended.name.role, ended.name.rank)
        rank = self._ranks.get(key)
        if rank is None or rank.state != "running" or rank.place.node != node.name:
            return
        if not ended.kind:
            rank.state = "done"
            self._answer_open_calls(key, "the rank has returned")
            self._events.put(Returned(*key, json.loads(ended.result)))
            return
        if ended.kind == "asked":
            rank.state = "stopped"
            self._answer_open_calls(key, "the rank was asked to end")
            self._events.put(RankStopped(*key))
            return
        error = error_from_dict(json.loads(ended.error)) if ended.error else None
        self._fail(key, node.name, ended.kind, ended.message, ended.log_tail, error, ended.seconds_ago)

    def _fail(
        self, key: RankKey, node: str, kind: str, message: str, log_tail: str = "", error: Any = None, ago: float = 0.0
    ) -> None:
        self._ranks[key].state = "failed"
        self._answer_open_calls(key, message)
        seconds = time.monotonic() - self._began - ago
        failure = Failure(*key, node, self.generation, kind, message, seconds, log_tail, error)
        self._failures.append(f"{key[0]} rank {key[1]} on {node}: {message}")
        self._events.put(failure)

    def _answer_open_calls(self, key: RankKey, words: str) -> None:
        for call_id in [number for number, (of, _) in self._open_calls.items() if of == key]:
            del self._open_calls[call_id]
            self._events.put(CallResult(call_id, *key, None, b"", words))

    def leave(self, member: Member, connection: int) -> None:
        """The connection of a member has ended; it may come back."""
        with self._lock:
            if member.connection == connection:
                member.connected = False

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(CHECK_SECONDS):
            now = time.monotonic()
            held, looked = now - looked - CHECK_SECONDS, now
            with self._lock:
                for name, member in list(self._members.items()):
                    if held > BEAT_SECONDS:  # this process was held itself: what was said meanwhile is still to be read
                        member.heard += held
                    if now - member.heard > SILENT_SECONDS:
                        self._lose(name, member)

    def _lose(self, name: str, member: Member) -> None:
        kind = "silent" if member.connected else "unreachable"
        words = "has not been heard of" if member.connected else "closed its connection and did not come back"
        message = f"its node {name} {words} for {SILENT_SECONDS:g} s"
        del self._members[name]
        self._lost_tickets.add(member.ticket)
        member.outbox.put(None)
        self._events.put(NodeLost(member.node, kind, message))
        for key, rank in self._ranks.items():
            if rank.place.node == name and rank.state == "running":
                self._fail(key, name, kind, message)

    def current(self, metadata: Mapping[str, str]) -> str:
        """Why a rank's call is refused: it is of another generation; "" where it is not."""
        stated = metadata.get("generation", "none")
        if stated == str(self.generation):
            return ""
        return f"generation {stated} is over: the hub is at generation {self.generation}"

    def told(self, told: wire.Told) -> None:
        """Takes what a rank tells, once. Raises ValueError where it is not JSON."""
        key, body = (told.name.role, told.name.rank), json.loads(told.body or b"null")
        with self._lock:
            if told.number > self._told.get(key, 0):
                self._told[key] = told.number
                self._events.put(Message(*key, told.kind, body, told.blob))

    def answered(self, answer: wire.CallAnswer) -> None:
        """Takes a rank's answer, once. Raises ValueError where it is not JSON."""
        key, body = (answer.name.role, answer.name.rank), json.loads(answer.body or b"null")
        with self._lock:
            if self._open_calls.get(answer.id, (None,))[0] == key:
                del self._open_calls[answer.id]
                self._events.put(CallResult(answer.id, *key, body, answer.blob, answer.error))

    def calls_of(self, name: wire.RankName, after: int) -> queue.SimpleQueue[wire.Call | None] | None:
        """The calls to a rank beginning with the open ones after the id `after`, then as they come, None at the end of
        the generation, or where the rank listens anew. None where there is no such rank."""
        key = (name.role, name.rank)
        with self._lock:
            if key not in self._ranks:
                return None
            if key in self._calls:
                self._calls[key].put(None)
            calls: queue.SimpleQueue[wire.Call | None] = queue.SimpleQueue()
            self._calls[key] = calls
            for call_id, (of, call) in self._open_calls.items():
                if of == key and call_id > after:
                    calls.put(call)
            return calls

    def key(self, request: wire.KeyRequest, generation: int) -> wire.KeyReply | None:
        """The reply; None where the generation ended meanwhile."""
        return self._keys.answer(request, generation)

    def status(self) -> wire.StatusReply:
        with self._lock:
            ranks = [
                wire.RankStatus(name=wire.RankName(role=role, rank=number), node=rank.place.node, state=rank.state)
                for (role, number), rank in self._ranks.items()
            ]
            return wire.StatusReply(
                generation=self.generation,
                nodes=[wire_node(member.node) for member in self._members.values()],
                ranks=ranks,
                failures=self._failures[-100:],
                seconds=time.monotonic() - self._began,
            )

    def ask_stop(self, *, by_person: bool = False) -> None:
        """Has the driver end the job: ranks save first."""
        self._events.put(StopAsked(by_person))

    @property
    def welcome(self) -> wire.Welcome:
        return self._welcome
