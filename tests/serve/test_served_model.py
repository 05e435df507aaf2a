"""The served model as the event loop sees it, with an engine's side that does not keep to the rules."""

from __future__ import annotations

import asyncio
import socket

import pytest

from meshwright.serve.errors import RequestError
from meshwright.serve.workers import channel
from meshwright.serve.workers.request import GenerationRequest
from meshwright.serve.workers.served_model import ServedModel


@pytest.mark.parametrize(
    "message", [{"op": "events"}, {"op": "accepted", "id": 1}, {"id": 1}, {"op": "events", "active": 0, "waiting": 0,
    "events": [[1, "a"]]}]
)  # fmt: skip
def test_a_message_that_cannot_be_handled_is_the_end_of_the_engine(message):
    """No request is left without an answer, and the server no longer calls itself healthy."""

    async def go() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(channel.pack({"op": "ready", "model": "m", "max_len": 9, "max_batch": 1}))
            model = await ServedModel.connect(*await asyncio.open_connection(sock=ours))
            reply = model.submit([GenerationRequest("a")])
            assert model.healthy
            theirs.sendall(channel.pack(message))
            await asyncio.wait_for(model.engine_lost.wait(), 30)
            assert not model.healthy and model.open_choices == 0
            with pytest.raises(RequestError, match="the engine stopped") as caught:
                await asyncio.wait_for(reply.accepted(), 30)
            assert caught.value.status == 500
            with pytest.raises(RequestError) as caught:
                model.submit([GenerationRequest("a")])
            assert caught.value.status == 503
            await model.close(0)

    asyncio.run(go())
