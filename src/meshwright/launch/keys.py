"""The keys by which the ranks of one generation meet, in the hub's memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from meshwright.launch.wire import hub_pb2 as wire

#: The longest wait of one request. Who waits longer asks again, so that a dead rank's request does not stay.
LONGEST_WAIT_SECONDS = 10.0
MAX_KEY_BYTES = 4096
MAX_TABLE_BYTES = 256 << 20
#: Replies that are kept for requests that come again because their answer was lost with its connection.
KEPT_REPLIES = 4096


class KeyTable:
    """Bytes by key, with torch.distributed.Store's operations. A generation begins with none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._generation = 0
        self._values: dict[str, bytes] = {}
        self._bytes = 0
        self._replies: OrderedDict[int, wire.KeyReply] = OrderedDict()  # to requests that would not act twice alike

    def clear(self, generation: int) -> None:
        """Empties the table for `generation`; who waits for a key of an older one gets no answer."""
        with self._changed:
            self._generation, self._values, self._bytes = generation, {}, 0
            self._replies.clear()
            self._changed.notify_all()

    def answer(self, request: wire.KeyRequest, generation: int) -> wire.KeyReply | None:
        """The reply; `found` is False where a wait was too short. None once `generation` is over.

        Raises ValueError for a request that cannot be answered.
        """
        operations = wire.KeyRequest
        keys = list(request.keys)
        if not keys and request.operation not in (operations.WAIT, operations.CHECK, operations.COUNT):
            raise ValueError("no key is named")
        with self._changed:
            if generation != self._generation:
                return None
            if request.operation in (operations.GET, operations.WAIT):
                return self._wait(keys, request.wait_seconds, generation)
            if request.operation == operations.CHECK:
                return wire.KeyReply(found=self._has(keys))
            if request.operation == operations.COUNT:
                return wire.KeyReply(found=True, number=len(self._values))
            if (reply := self._replies.get(request.id)) is None:
                reply = self._write(request, keys[0])
                self._replies[request.id] = reply
                if len(self._replies) > KEPT_REPLIES:
                    self._replies.popitem(last=False)
            if request.operation == operations.COMPARE:
                value = self._values.get(keys[0], request.expected)
                return wire.KeyReply(found=keys[0] in self._values, value=value)
            return reply

    def _write(self, request: wire.KeyRequest, key: str) -> wire.KeyReply:
        if request.operation == wire.KeyRequest.DELETE:
            return wire.KeyReply(found=self._drop(key))
        before = self._values.get(key)
        if request.operation == wire.KeyRequest.SET:
            self._put(key, request.value)
            return wire.KeyReply(found=True)
        if request.operation == wire.KeyRequest.ADD:
            reply = wire.KeyReply(found=True, number=int(before or b"0") + request.amount)
            self._put(key, str(reply.number).encode())
            return reply
        if before == request.expected or (before is None and not request.expected):
            self._put(key, request.value)
        return wire.KeyReply()

    def _put(self, key: str, value: bytes) -> None:
        size = len(value) - len(self._values[key]) if key in self._values else len(key) + len(value)
        if len(key) > MAX_KEY_BYTES or self._bytes + size > MAX_TABLE_BYTES:
            raise ValueError(f"keys may have {MAX_KEY_BYTES} bytes, and all of them {MAX_TABLE_BYTES}")
        self._bytes += size
        self._values[key] = value
        self._changed.notify_all()

    def _drop(self, key: str) -> bool:
        value = self._values.pop(key, None)
        self._bytes -= len(key) + len(value) if value is not None else 0
        return value is not None

    def _has(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def _wait(self, keys: list[str], wait_seconds: float, generation: int) -> wire.KeyReply | None:
        deadline = time.monotonic() + min(wait_seconds, LONGEST_WAIT_SECONDS)

        def over() -> bool:
            return self._has(keys) or generation != self._generation

        found = self._changed.wait_for(over, max(0.0, deadline - time.monotonic()))
        if generation != self._generation:
            return None
        return wire.KeyReply(found=found, value=self._values[keys[0]] if found and keys else b"")
