"""The engine's side of the channel, with tokenizers and messages that do not keep to the rules."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshwright.serve.workers import channel
from meshwright.serve.workers.worker import EngineLoop
from tests.serve.conftest import ByteTokenizer, EchoEngine


class Panic(BaseException):
    """As pyo3 raises where Rust code panics: not an Exception."""


class PanickingTokenizer(ByteTokenizer):
    def encode(self, text: str, *, add_special: bool) -> list[int]:
        raise Panic("index out of bounds")


def test_a_panic_of_the_tokenizer_is_an_error_of_its_request_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor() as pool:
        ended = pool.submit(EngineLoop(EchoEngine(), PanickingTokenizer(), "echo", theirs).run)
        assert channel.receive(ours)["op"] == "ready"
        for request in (1, 2):
            ours.sendall(channel.pack({"op": "submit", "id": request, "prompt": "a", "add_special": True}))
            refused = channel.receive(ours)
            assert (refused["op"], refused["id"]) == ("refused", request)
        ours.sendall(channel.pack({"op": "stop"}))
        ended.result(30)


def test_a_message_that_cannot_be_read_ends_the_engine() -> None:
    """Otherwise the server calls itself healthy and nobody is answered."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor() as pool:
        ended = pool.submit(EngineLoop(EchoEngine(), ByteTokenizer(), "echo", theirs).run)
        assert channel.receive(ours)["op"] == "ready"
        ours.sendall(channel.pack({"op": "submit", "id": 1}))
        with pytest.raises(KeyError):
            ended.result(30)
