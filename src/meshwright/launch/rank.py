"""A rank's side of the hub: its place, the keys by which it meets the others, and what it says to the driver."""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc

from meshwright.errors import Problem, RunFailed
from meshwright.launch.hub_disk import HubDisk
from meshwright.launch.messages import Dial, RankPlace
from meshwright.launch.service import MAX_MESSAGE_BYTES, connect
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubStub

#: How long keys and answers wait for a hub that cannot be reached: one that is started again is back by then.
HUB_SECONDS = 60.0
#: Pause before what could not be sent is sent again.
RETRY_SECONDS = 0.2
#: How long after a secret was replaced ranks have the new one.
SECRET_SECONDS = 10.0


@dataclass(frozen=True)
class Call:
    """What the driver asks of this rank. `reply` answers it, once."""

    name: str
    body: Any
    blob: bytes
    reply: Callable[..., None]


class Context:
    """A rank's place among the ranks of its role, and its connection to the hub, made on first use.

    rank, world: among the ranks of `role`; local_rank: among those of this node; device: the index of its device on the
    node; generation: rises with every start of ranks; folder: that of the logs; node: its name; copies: a folder of
    the node's own for copies of what is in the run folder, None where the node sees the run folder's disk.
    """

    def __init__(self, place: RankPlace, secret: Callable[[], str] | None = None) -> None:
        """secret: reads the hub's secret, which may be replaced (default: that of `place`)."""
        self.role, self.rank, self.world = place.role, place.rank, place.world
        self.local_rank, self.device = place.local_rank, place.device
        self.generation, self.folder = place.generation, place.folder
        self.node, self.copies = place.node, Path(place.copies) if place.copies else None
        self._dial, self._secret = place.dial, secret or (lambda: place.dial.secret)
        self._told: _Told | None = None
        #: What must live as long as the rank.
        self.held: list[object] = []

    @classmethod
    def alone(cls) -> Context:
        """That of the only rank, in the process that calls this: nobody started it, and it has no hub."""
        return cls(RankPlace("rank", 0, 1, 0, 0, 0, Path(), Dial("", "")))

    @cached_property
    def _hub(self) -> _Client:
        return _Client(self._dial, self.generation, self._secret)

    @property
    def _name(self) -> wire.RankName:
        return wire.RankName(role=self.role, rank=self.rank)

    def keys(self, prefix: str = "") -> Keys:
        """The keys that this generation's ranks share, all behind `prefix`."""
        return Keys(self._hub, prefix)

    def hub_disk(self, root: Path) -> HubDisk | None:
        """The run folder `root`, which is the driver's, through the hub, which it waits for as `tell` does; None where
        the node sees its disk."""
        return None if self.copies is None else HubDisk(root, self._hub.read, self._hub.write)

    def tell(self, kind: str, body: Any = None, blob: bytes = b"") -> None:
        """Tells the driver, in the order of the calls and without waiting; body: JSON. What was told has arrived when
        the function of this rank has returned: while the hub is away it waits, for as long as the agent lets it live.
        Raises RunFailed where the hub refuses this rank, ValueError for more than MAX_MESSAGE_BYTES."""
        told = wire.Told(name=self._name, kind=kind, body=json.dumps(body).encode(), blob=blob)
        if told.ByteSize() > MAX_MESSAGE_BYTES - 1024:
            raise ValueError(f"what is told has {told.ByteSize()} bytes, more than the {MAX_MESSAGE_BYTES} allowed")
        if self._told is None:
            self._told = _Told(self._hub)
        self._told.put(told)

    def calls(self) -> Iterator[Call]:
        """What the driver asks of this rank, as it comes, until the generation is over."""
        for call in self._hub.calls(self._name):
            yield Call(call.name, json.loads(call.body), call.blob, self._replier(call.id))

    def _replier(self, call_id: int) -> Callable[..., None]:
        def reply(body: Any = None, blob: bytes = b"", error: str = "") -> None:
            answer = wire.CallAnswer(
                name=self._name, id=call_id, body=json.dumps(body).encode(), blob=blob, error=error
            )
            self._hub.answer(answer)

        return reply

    def close(self) -> None:
        """Waits until what was told has arrived."""
        if self._told is not None:
            self._told.close()


class Keys:
    """Bytes by key, shared by the ranks of a generation; after torch.distributed.Store. All waits are in seconds, and
    raise TimeoutError; every method raises RunFailed once the generation is over."""

    def __init__(self, hub: _Client, prefix: str) -> None:
        self._hub, self._prefix = hub, prefix

    def set(self, key: str, value: bytes) -> None:
        self._ask(wire.KeyRequest.SET, [key], value=value)

    def get(self, key: str, timeout_seconds: float) -> bytes:
        """The key's bytes, once it has been set."""
        return self._wait(wire.KeyRequest.GET, [key], timeout_seconds).value

    def add(self, key: str, amount: int) -> int:
        """Adds to a whole number, 0 where the key is absent; returns the sum."""
        return self._ask(wire.KeyRequest.ADD, [key], amount=amount).number

    def wait(self, keys: Sequence[str], timeout_seconds: float) -> None:
        """Returns once all `keys` have been set."""
        self._wait(wire.KeyRequest.WAIT, keys, timeout_seconds)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` have been set."""
        return self._ask(wire.KeyRequest.CHECK, keys).found

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Sets `desired` where the key holds `expected`, or is absent and `expected` is empty; returns what it holds
        then, `expected` where it is absent."""
        return self._ask(wire.KeyRequest.COMPARE, [key], expected=expected, value=desired).value

    def delete(self, key: str) -> bool:
        """Whether there was such a key."""
        return self._ask(wire.KeyRequest.DELETE, [key]).found

    def count(self) -> int:
        """The number of keys, with any prefix."""
        return self._ask(wire.KeyRequest.COUNT, []).number

    def _ask(self, operation: Any, keys: Sequence[str], **fields: Any) -> wire.KeyReply:
        full = [self._prefix + key for key in keys]
        number = 1 + secrets.randbelow(2**64 - 1)
        return self._hub.key(wire.KeyRequest(operation=operation, keys=full, id=number, **fields))

    def _wait(self, operation: Any, keys: Sequence[str], timeout_seconds: float) -> wire.KeyReply:
        deadline = time.monotonic() + timeout_seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            reply = self._ask(operation, keys, wait_seconds=left)
            if reply.found:
                return reply
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no rank has set {', '.join(keys)} within {timeout_seconds:g} s")


class _Client:
    """The hub's methods for a rank. Where the hub cannot be reached they are tried again: a request that arrives twice
    acts once."""

    def __init__(self, dial: Dial, generation: int, read_secret: Callable[[], str]) -> None:
        self._stub = HubStub(connect(dial.address, dial.certificate))
        self._generation, self._read_secret = generation, read_secret

    def key(self, request: wire.KeyRequest) -> wire.KeyReply:
        reply: wire.KeyReply = self._call(self._stub.Key, request, HUB_SECONDS + request.wait_seconds)
        return reply

    def read(self, request: wire.ReadRequest) -> wire.ReadReply:
        reply: wire.ReadReply = self._call(self._stub.Read, request, None)
        return reply

    def write(self, request: wire.WriteRequest) -> wire.WriteReply:
        reply: wire.WriteReply = self._call(self._stub.Write, request, None)
        return reply

    def answer(self, answer: wire.CallAnswer) -> None:
        self._call(self._stub.Answer, answer, HUB_SECONDS)

    def tell(self, told: wire.Told) -> None:
        self._call(self._stub.Tell, told, None)

    def calls(self, name: wire.RankName) -> Iterator[wire.Call]:
        """Each call once, until the generation is over."""
        request, tries = wire.CallsRequest(name=name), _Tries(None)
        while True:
            try:
                for call in self._stub.Calls(request, metadata=self._metadata(), wait_for_ready=True):
                    request.after = call.id
                    yield call
                return
            except grpc.RpcError as error:
                tries.again(error)

    def _call(self, method: Any, request: Any, timeout_seconds: float | None) -> Any:
        tries = _Tries(timeout_seconds)
        while True:
            try:
                return method(request, metadata=self._metadata(), timeout=tries.left_seconds(), wait_for_ready=True)
            except grpc.RpcError as error:
                tries.again(error)

    def _metadata(self) -> list[tuple[str, str]]:
        return [("secret", self._read_secret()), ("generation", str(self._generation))]


class _Tries:
    """How long what has failed is tried again: for `timeout_seconds` (None: no limit) where the hub cannot be reached,
    for SECRET_SECONDS where it refuses the secret, which may have been replaced a moment ago."""

    def __init__(self, timeout_seconds: float | None) -> None:
        self._until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._refused_until: float | None = None

    def left_seconds(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def again(self, error: grpc.RpcError) -> None:
        """Waits a moment. Raises RunFailed where another try is of no use."""
        now = time.monotonic()
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            self._refused_until = self._refused_until or now + SECRET_SECONDS
            hopeless = now > self._refused_until
        else:
            hopeless = error.code() != grpc.StatusCode.UNAVAILABLE or (self._until is not None and now > self._until)
        if hopeless:
            raise _in_words(error) from error
        time.sleep(RETRY_SECONDS)


class _Told:
    """What a rank tells the driver, sent by a thread, one after the other."""

    def __init__(self, hub: _Client) -> None:
        self._queue: queue.SimpleQueue[wire.Told | None] = queue.SimpleQueue()
        self._hub = hub
        self._error: RunFailed | None = None
        self._thread = threading.Thread(target=self._send, name="meshwright-tell", daemon=True)
        self._thread.start()

    def put(self, told: wire.Told) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(told)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        try:
            for number, told in enumerate(iter(self._queue.get, None), 1):
                told.number = number
                self._hub.tell(told)
        except RunFailed as error:
            self._error = error


def _in_words(error: grpc.RpcError) -> RunFailed:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return RunFailed(Problem("launch", f"the hub cannot be reached: {error.details()}"))
    return RunFailed(Problem("launch", f"the hub refuses this rank: {error.details()}"))


def place_of(record: dict[str, Any]) -> RankPlace:
    """A rank's place from the JSON that its agent wrote."""
    return RankPlace(**{**record, "folder": Path(record["folder"]), "dial": Dial(**record["dial"])})
