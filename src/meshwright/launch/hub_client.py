"""A rank's calls of the hub: keys, what it tells the driver, and what the driver asks of it."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from meshwright.errors import Problem, RunFailed
from meshwright.launch.messages import Dial
from meshwright.launch.service import MAX_MESSAGE_BYTES, connect
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubStub

#: How long keys and answers wait for a hub that cannot be reached: one that is started again is back by then.
HUB_SECONDS = 60.0
#: Pause before what could not be sent is sent again.
RETRY_SECONDS = 0.2
#: How long after a secret was replaced ranks have the new one.
SECRET_SECONDS = 10.0
#: What is told within so long is sent together: a message of its own for each short step would slow it down.
GATHER_SECONDS = 0.05


class Keys:
    """Bytes by key, shared by the ranks of a generation; after torch.distributed.Store. All waits are in seconds, and
    raise TimeoutError; every method raises RunFailed once the generation is over."""

    def __init__(self, hub: HubClient, prefix: str) -> None:
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


class HubClient:
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

    def tell(self, told: wire.ToldTogether) -> None:
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
            self._refused_until = None
            hopeless = error.code() != grpc.StatusCode.UNAVAILABLE or (self._until is not None and now > self._until)
        if hopeless:
            raise _in_words(error) from error
        time.sleep(RETRY_SECONDS)


class Telling:
    """What a rank tells the driver, sent by a thread, in order."""

    def __init__(self, hub: HubClient) -> None:
        self._queue: queue.SimpleQueue[wire.Told | None] = queue.SimpleQueue()
        self._hub = hub
        self._error: RunFailed | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, name="meshwright-tell", daemon=True)
        self._thread.start()

    def put(self, told: wire.Told) -> None:
        """Raises ValueError for more than MAX_MESSAGE_BYTES, RunFailed where the hub has refused what came before."""
        if told.ByteSize() > MAX_MESSAGE_BYTES - 1024:
            raise ValueError(f"what is told has {told.ByteSize()} bytes, more than the {MAX_MESSAGE_BYTES} allowed")
        if self._error is not None:
            raise self._error
        self._queue.put(told)

    def close(self) -> None:
        """Waits until all has arrived."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        try:
            for together in self._gathered():
                self._hub.tell(together)
        except RunFailed as error:
            self._error = error

    def _gathered(self) -> Iterator[wire.ToldTogether]:
        """What is told within GATHER_SECONDS, numbered, as far as one message takes it."""
        number = 0
        while (told := self._queue.get()) is not None:
            self._closing.wait(GATHER_SECONDS)
            together, size = wire.ToldTogether(), 0
            while told is not None:
                number += 1
                told.number = number
                if together.told and size + told.ByteSize() > MAX_MESSAGE_BYTES - 1024:
                    yield together
                    together, size = wire.ToldTogether(), 0
                together.told.append(told)
                size += told.ByteSize() + 16
                if self._queue.empty():
                    break
                told = self._queue.get()
            yield together
            if told is None:
                return


def _in_words(error: grpc.RpcError) -> RunFailed:
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return RunFailed(Problem("launch", f"the hub cannot be reached: {error.details()}"))
    return RunFailed(Problem("launch", f"the hub refuses this rank: {error.details()}"))
