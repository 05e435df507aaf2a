"""The served model as seen from the event loop: admission, streams of text, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from meshwright.serve.errors import RequestError, overloaded, unavailable
from meshwright.serve.metrics import Metrics
from meshwright.serve.workers import channel
from meshwright.serve.workers.request import GenerationRequest

log = logging.getLogger(__name__)

#: Choices that may wait per slot of the batch before requests are refused with 429.
WAITING_PER_SLOT = 8


@dataclass(frozen=True)
class TextChunk:
    """What one step adds to a choice: `text` (maybe ""), the number of `tokens`, and at the end the reason."""

    text: str
    tokens: int
    finish_reason: str | None


class Reply:
    """The growing choices of one request. Iterate it once, after `accepted`; `cancel` frees the engine's slots.

    Iterating yields (choice, TextChunk) until all choices have ended, and raises RequestError if the engine refuses the
    request or is lost.
    """

    def __init__(self, model: ServedModel, requests: list[GenerationRequest]) -> None:
        self._model = model
        self._queue: asyncio.Queue[tuple[int, TextChunk] | RequestError] = asyncio.Queue()
        self._accepted = asyncio.Event()
        self._error: RequestError | None = None
        self._waiting = len(requests)
        self._open: dict[int, int] = {}  # engine's id -> choice
        self._began = time.perf_counter()
        self._first_token = True
        self.prompt_tokens = [0] * len(requests)

    async def accepted(self) -> None:
        """Waits until the engine has accepted every choice. Raises RequestError if it refuses one."""
        await self._accepted.wait()
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[tuple[int, TextChunk]]:
        remaining = len(self.prompt_tokens)
        while remaining:
            item = await self._queue.get()
            if isinstance(item, RequestError):
                raise item
            yield item
            remaining -= item[1].finish_reason is not None

    def cancel(self) -> None:
        """Cancels the choices that have not ended."""
        if self._open:
            self._model._cancel(list(self._open))
            self._open.clear()

    def _accept(self, engine_id: int, prompt_tokens: int) -> None:
        self.prompt_tokens[self._open[engine_id]] = prompt_tokens
        self._waiting -= 1
        if not self._waiting:
            self._accepted.set()

    def _fail(self, error: RequestError) -> None:
        self._error = self._error or error
        self._accepted.set()
        self._queue.put_nowait(error)
        self.cancel()

    def _add(self, engine_id: int, piece: TextChunk) -> None:
        choice = self._open[engine_id]
        metrics = self._model.metrics
        if self._first_token and piece.tokens:
            self._first_token = False
            metrics.first_token_seconds.observe(time.perf_counter() - self._began)
        metrics.generated_tokens.inc(piece.tokens)
        if piece.finish_reason is not None:
            del self._open[engine_id]
            if not self._open:
                metrics.request_seconds.observe(time.perf_counter() - self._began)
        self._queue.put_nowait((choice, piece))


class ServedModel:
    """A model in another process (or thread) behind a channel. Created by `connect`; its methods never block."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ready: dict[str, Any]) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._replies: dict[int, Reply] = {}
        self._reserved = 0  # choices that will be submitted when their prompt is rendered
        self._draining = False
        self.engine_lost = asyncio.Event()  # set when the engine has ended, asked to or not
        self.name: str = ready["model"]
        self.max_len: int = ready["max_len"]
        self.capacity: int = ready["max_batch"] * (1 + WAITING_PER_SLOT)
        self.created = int(time.time())
        self.metrics = Metrics(self.name)
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ServedModel:
        """Waits for the engine's `ready`. Raises ChannelClosed if it ends before."""
        ready = await channel.receive_async(reader)
        if ready.get("op") != "ready":
            raise channel.ChannelClosed("the engine's first message is not 'ready'")
        return cls(reader, writer, ready)

    @property
    def open_choices(self) -> int:
        """Choices that have a place in the queue."""
        return len(self._replies) + self._reserved

    @property
    def healthy(self) -> bool:
        return not self._draining and not self.engine_lost.is_set()

    def check_name(self, name: str | None) -> None:
        """Raises RequestError (404) unless `name` is absent or this model's."""
        if name is not None and name != self.name:
            raise RequestError(
                404, f"no such model; this server has '{self.name}'", code="model_not_found", param="model"
            )

    @contextlib.contextmanager
    def reserve(self, choices: int) -> Iterator[None]:
        """Holds places in the queue for choices while their prompt is made, so that this, too, waits within its limit.
        Raises as `submit` does, which follows at once."""
        self._check_room(choices)
        self._reserved += choices
        try:
            yield
        finally:
            self._reserved -= choices

    def _check_room(self, choices: int) -> None:
        if not self.healthy:
            raise unavailable("the server is stopping")
        if choices > self.capacity:
            raise RequestError(
                400, f"this server takes at most {self.capacity} choices", code="invalid_value", param="n"
            )
        if self.open_choices + choices > self.capacity:
            raise overloaded("the queue is full; try again in a moment")

    def submit(self, requests: list[GenerationRequest]) -> Reply:
        """Queues all requests, or none. Raises RequestError 429 when the queue is full, 503 when stopping."""
        self._check_room(len(requests))
        reply = Reply(self, requests)
        for choice, request in enumerate(requests):
            engine_id = next(self._ids)
            self._replies[engine_id] = reply
            reply._open[engine_id] = choice
            self._send({"op": "submit", "id": engine_id, **request.as_dict()})
        self.metrics.open_choices.set(self.open_choices)
        return reply

    def _send(self, message: dict[str, Any]) -> None:
        if not self.engine_lost.is_set():
            self._writer.write(channel.pack(message))

    def _cancel(self, engine_ids: list[int]) -> None:
        for engine_id in engine_ids:
            if self._replies.pop(engine_id, None) is not None:
                self._send({"op": "cancel", "id": engine_id})
                self.metrics.cancelled.inc()
        self.metrics.open_choices.set(self.open_choices)

    async def _listen(self) -> None:
        try:
            while True:
                message = await channel.receive_async(self._reader)
                if message["op"] == "lost":
                    break
                self._handle(message)
        except channel.ChannelClosed:
            pass
        except Exception as error:  # a bug of ours; without a listener nobody would be answered
            log.error("a message of the engine could not be handled", exc_info=error)
        self.engine_lost.set()
        for reply in set(self._replies.values()):
            reply._fail(RequestError(500, "the engine stopped", code="engine_lost"))
        self._replies.clear()
        self.metrics.open_choices.set(self.open_choices)
        self.metrics.active.set(0)
        self.metrics.waiting.set(0)

    def _handle(self, message: dict[str, Any]) -> None:
        """Handles a message of the engine. Messages about choices that have been cancelled are ignored."""
        if message["op"] == "events":
            self.metrics.active.set(message["active"])
            self.metrics.waiting.set(message["waiting"])
            for engine_id, text, tokens, finish_reason in message["events"]:
                if (reply := self._replies.get(engine_id)) is not None:
                    reply._add(engine_id, TextChunk(text, tokens, finish_reason))
                    if finish_reason is not None:
                        del self._replies[engine_id]
            self.metrics.open_choices.set(self.open_choices)
        elif (reply := self._replies.get(message["id"])) is not None:
            if message["op"] == "accepted":
                self.metrics.prompt_tokens.inc(message["prompt_tokens"])
                reply._accept(message["id"], message["prompt_tokens"])
            else:
                del self._replies[message["id"]]
                del reply._open[message["id"]]
                words = {"code": message["code"], "param": message["param"]}
                reply._fail(RequestError(message["status"], message["message"], **words))

    def drain(self) -> None:
        """Refuses new requests from now on; running ones continue."""
        self._draining = True

    async def close(self, grace_seconds: float) -> None:
        """Drains, gives running requests `grace_seconds`, cancels the rest, and tells the engine to end."""
        self.drain()
        deadline = time.monotonic() + grace_seconds
        while self._replies and not self.engine_lost.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for reply in set(self._replies.values()):
            reply._fail(unavailable("the server stopped before this was done"))
        self._send({"op": "stop"})
        with contextlib.suppress(OSError):
            await self._writer.drain()
        try:
            async with asyncio.timeout(5):
                await self.engine_lost.wait()
        except TimeoutError:
            self._listener.cancel()
        self._writer.close()
