"""The engine's side of the channel: a loop that receives requests, steps the engine, and sends text.

It runs in a process of its own, so that steps and the event loop do not delay each other (in one process they would
share Python's lock). `serve` starts it through `launch`, one process per tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from meshwright.engine import Engine, Request, TextStream, TokenEvent
from meshwright.errors import MeshwrightError
from meshwright.serve.workers import channel
from meshwright.serve.workers.text import TextTokenizer

log = logging.getLogger(__name__)

#: This many failed steps in a row end the engine.
MAX_FAILED_STEPS = 3


class PromptTokenizer(Protocol):
    """What the loop needs of a tokenizer."""

    special: Mapping[int, str]

    def encode(self, text: str, *, add_special: bool) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class StepEngine(Protocol):
    """What the loop needs of an engine: that of `engine.Engine` and of the tests' double."""

    max_len: int
    max_batch: int

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def submit(self, request: Request) -> int: ...

    def cancel(self, id: int) -> bool: ...

    def step(self) -> list[TokenEvent]: ...


@dataclass(frozen=True)
class ActiveSequence:
    """A choice that is being generated: the server's id for it, and its text so far."""

    server_id: int
    text: TextStream


class EngineLoop:
    """Serves `engine` under `name` to the server at the other end of `connection`, until it says stop or has ended."""

    def __init__(
        self,
        engine: StepEngine,
        tokenizer: PromptTokenizer,
        name: str,
        connection: socket.socket,
        *,
        max_failed_steps: int = MAX_FAILED_STEPS,
    ) -> None:
        self._engine = engine
        self._max_failed_steps = max_failed_steps
        self._tokenizer = tokenizer
        self._name = name
        self._connection = connection
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sequences: dict[int, ActiveSequence] = {}  # by the engine's id
        self._engine_ids: dict[int, int] = {}  # the server's id -> the engine's
        self._failed_steps = 0
        self._sent_counts = (0, 0)

    def run(self) -> None:
        """Returns when told to stop or when the server has ended. Raises the error of the last failed step."""
        engine = self._engine
        ready = {"model": self._name, "max_len": engine.max_len, "max_batch": engine.max_batch}
        threading.Thread(target=self._read, name="meshwright-serve-read", daemon=True).start()
        try:
            self._send({"op": "ready", **ready})
            while self._take_messages():
                if self._sequences:
                    self._step()
                self._send_counts()
        except channel.ChannelClosed:
            pass  # the server has ended
        finally:
            with contextlib.suppress(channel.ChannelClosed):
                self._send({"op": "lost"})

    def _read(self) -> None:
        """In a thread of its own: receives messages and tokenizes prompts, which does not hold Python's lock."""
        try:
            while True:
                message = channel.receive(self._connection)
                if message["op"] == "submit":
                    message = self._tokenize(message)
                self._inbox.put(message)
        except channel.ChannelClosed:
            self._inbox.put({"op": "stop"})
        except BaseException as error:  # without this thread no request would be answered: it is the end of the engine
            self._inbox.put({"op": "failed", "error": error})

    def _tokenize(self, message: dict[str, Any]) -> dict[str, Any]:
        prompt = message["prompt"]
        try:
            if isinstance(prompt, str):
                prompt = self._tokenizer.encode(prompt, add_special=message["add_special"])
        except (
            BaseException
        ) as error:  # what hostile text does to a tokenizer, its panics too, concerns this request alone
            log.warning("a prompt could not be tokenized", exc_info=error)
            return {"op": "refuse", "id": message["id"]}
        return {**message, "prompt": tuple(prompt)}

    def _take_messages(self) -> bool:
        """Handles the messages that have arrived, and waits for one if no sequence runs. Returns False at the end."""
        wait = not self._sequences
        while wait or not self._inbox.empty():
            wait = False
            message = self._inbox.get()
            if message["op"] == "stop":
                return False
            if message["op"] == "failed":
                raise message["error"]
            if message["op"] == "submit":
                self._submit(message)
            elif message["op"] == "refuse":
                self._refuse(message["id"], "the prompt cannot be tokenized")
            elif (engine_id := self._engine_ids.pop(message["id"], None)) is not None:
                del self._sequences[engine_id]
                self._engine.cancel(engine_id)
        return True

    def _submit(self, message: dict[str, Any]) -> None:
        fields = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos")
        try:
            engine_id = self._engine.submit(
                Request(prompt_ids=message["prompt"], **{name: message[name] for name in fields})
            )
        except MeshwrightError as error:
            problem = error.problems[0]
            self._refuse(message["id"], str(problem).replace(": ", " ", 1), param=problem.where or None)
            return
        except Exception as error:  # a bug of ours must not end other requests
            log.error("a request could not be submitted", exc_info=error)
            self._refuse(message["id"], "the engine failed to take this request", status=500)
            return
        tokenizer, prompt = self._tokenizer, message["prompt"]
        text = TextStream(tokenizer.decode, message["stop"], prompt=prompt, special=tokenizer.special)
        self._sequences[engine_id] = ActiveSequence(message["id"], text)
        self._engine_ids[message["id"]] = engine_id
        self._send({"op": "accepted", "id": message["id"], "prompt_tokens": len(message["prompt"])})

    def _refuse(
        self, server_id: int, words: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        code = code or ("invalid_value" if status == 400 else "internal")
        fields = {"status": status, "code": code, "message": words, "param": param}
        self._send({"op": "refused", "id": server_id, **fields})

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:
            self._after_failed_step(error)
            return
        self._failed_steps = 0
        out = [item for event in events if (item := self._advance(event)) is not None]
        if out:
            self._send_events(out)

    def _after_failed_step(self, error: Exception) -> None:
        """Drops all sequences, so that later requests get a clean engine. Raises `error` if steps keep failing."""
        log.error("a step failed", exc_info=error)
        self._failed_steps += 1
        if self._failed_steps >= self._max_failed_steps:
            raise error
        for engine_id, sequence in list(self._sequences.items()):
            self._engine.cancel(engine_id)
            self._refuse(sequence.server_id, "the engine failed while working on this", status=500)
        self._sequences.clear()
        self._engine_ids.clear()

    def _advance(self, event: TokenEvent) -> list[Any] | None:
        """An event as the channel sends it; None for a choice that has been dropped."""
        sequence = self._sequences.get(event.id)
        if sequence is None:
            return None
        reason = event.finish_reason
        if reason == "error":
            del self._sequences[event.id]
            del self._engine_ids[sequence.server_id]
            words = "the model's logits are not finite (NaN or infinity) after this text"
            self._refuse(sequence.server_id, words, status=500, code="not_finite")
            return None
        text = "" if reason == "stop" else sequence.text.push(event.token)
        if sequence.text.stopped is not None:
            if reason is None:
                self._engine.cancel(event.id)
            reason = "stop"
        elif reason is not None:
            text += sequence.text.finish()
            if sequence.text.stopped is not None:
                reason = "stop"
        if reason is not None:
            del self._sequences[event.id]
            del self._engine_ids[sequence.server_id]
        return [sequence.server_id, text, 1, reason]

    def _send_events(self, events: list[Any]) -> None:
        self._sent_counts = (self._engine.running, self._engine.waiting)
        self._send({"op": "events", "active": self._sent_counts[0], "waiting": self._sent_counts[1], "events": events})

    def _send_counts(self) -> None:
        """Sends the engine's figures where they changed without an event, for example after a cancel."""
        if (self._engine.running, self._engine.waiting) != self._sent_counts:
            self._send_events([])

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(channel.pack(message))
        except OSError as error:
            raise channel.ChannelClosed(str(error)) from error


def run(payload: dict[str, Any], context: Any) -> None:
    """The function of every rank: opens the model; rank 0 serves it over the socket in `payload`."""
    folder = Path(payload["folder"])
    tokenizer = TextTokenizer(folder)
    engine = Engine.open(
        folder,
        max_batch=payload["max_batch"],
        max_len=payload["max_len"],
        precision=payload["precision"],
        context=context,
    )
    if context.rank > 0:
        engine.follow()
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(payload["socket"])
        # With several ranks one failure ends the engine: ranks that differ within a step would wait for ever.
        limit = MAX_FAILED_STEPS if context.world == 1 else 1
        EngineLoop(engine, tokenizer, payload["name"], connection, max_failed_steps=limit).run()
    engine.close()  # not after a failure: it sends to the other ranks, which may have ended
