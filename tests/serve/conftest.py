"""A deterministic engine that needs no model, and a whole server around it on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from meshwright.engine import Request, TokenEvent
from meshwright.engine.request import check
from meshwright.serve.access import Access
from meshwright.serve.server import Addresses, ModelServer
from meshwright.serve.workers.chat import DEFAULT_TEMPLATE, ChatTemplate, Renderer
from meshwright.serve.workers.served_model import ServedModel
from meshwright.serve.workers.worker import EngineLoop

END = 4  # the double's end-of-sequence id
SPOILED = 5  # in place of this one the double's logits are not finite


class ByteTokenizer:
    def __init__(self) -> None:
        self.special = {6: "<|six|>"}

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if id not in self.special).decode("utf-8", errors="replace")


@dataclass
class EchoEngine:
    """Continues a prompt with the prompt itself, over and over, a byte a step; `END` in it ends the sequence."""

    max_len: int = 4096
    max_batch: int = 4
    step_seconds: float = 0.0
    fail_next_steps: int = 0
    requests: dict[int, Request] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    submitted: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = itertools.count()

    @property
    def running(self) -> int:
        return min(len(self.requests), self.max_batch)

    @property
    def waiting(self) -> int:
        return max(len(self.requests) - self.max_batch, 0)

    def submit(self, request: Request) -> int:
        check(request, 256, self.max_len)
        if request.max_tokens is None:
            request = replace(request, max_tokens=self.max_len - len(request.prompt_ids))
        id = next(self._ids)
        self.requests[id] = request
        self.done[id] = 0
        self.submitted.append(request)
        return id

    def cancel(self, id: int) -> bool:
        return self.requests.pop(id, None) is not None

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_seconds)
        if self.fail_next_steps:
            self.fail_next_steps -= 1
            raise RuntimeError("tensor at 0x7f00 in /secret/path went wrong")
        events = []
        for id, request in list(self.requests.items())[: self.max_batch]:
            token = request.prompt_ids[self.done[id] % len(request.prompt_ids)]
            self.done[id] += 1
            reason = None
            if token == SPOILED:
                token, reason = -1, "error"
            elif token == END and not request.ignore_eos:
                reason = "stop"
            elif self.done[id] == request.max_tokens:
                reason = "length"
            if reason:
                del self.requests[id]
            events.append(TokenEvent(id, token, reason))
        return events


@contextlib.asynccontextmanager
async def in_thread(engine: EchoEngine) -> AsyncIterator[ServedModel]:
    """`engine` behind the real channel and the real loop, in a thread."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=EngineLoop(engine, ByteTokenizer(), "echo", theirs).run, daemon=True)
    thread.start()
    model = await ServedModel.connect(*await asyncio.open_connection(sock=ours))
    try:
        yield model
    finally:
        await model.close(0)
        await asyncio.to_thread(thread.join, 10)
        theirs.close()


class Server:
    """HTTP and gRPC in front of a double, on an event loop in a thread."""

    def __init__(self, engine: EchoEngine, token: str | None = None, template: ChatTemplate | None = None) -> None:
        self.engine = engine
        self._token = token
        self._template = template or ChatTemplate(DEFAULT_TEMPLATE, {}, own=False)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with in_thread(self.engine) as model, Renderer(self._template) as renderer:
            self.model = model
            server = ModelServer(model, renderer, Access("127.0.0.1", self._token), "127.0.0.1")
            self.addresses: Addresses = await server.start(0, 0)
            self._ready.set()
            await self._stop.wait()
            await server.stop(1.0)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(60)
        assert self._failure is None
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self._failure is None

    @property
    def url(self) -> str:
        return self.addresses.http

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for what must come; how long it takes is not what is tested."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(EchoEngine()) as running:
        yield running


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers with settings of their own; all end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda engine, **settings: stack.enter_context(Server(engine, **settings))


@pytest.fixture
def echo() -> type[EchoEngine]:
    return EchoEngine


@pytest.fixture
def until() -> Callable[..., None]:
    return wait_until
