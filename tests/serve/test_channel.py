"""Messages between the server and the engine's process."""

from __future__ import annotations

import socket
import struct

import pytest

from meshwright.serve.workers import channel


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_messages_come_whole_and_in_order(pair):
    left, right = pair
    messages = [{"op": "submit", "prompt": "é😀" * 1000}, {"op": "stop"}]
    data = b"".join(map(channel.pack, messages))
    for start in range(0, len(data), 777):
        left.sendall(data[start : start + 777])
    assert [channel.receive(right), channel.receive(right)] == messages


def test_an_end_in_the_middle_is_an_end(pair):
    left, right = pair
    left.sendall(channel.pack({"op": "stop"})[:-1])
    left.close()
    with pytest.raises(channel.ChannelClosed):
        channel.receive(right)


def test_lengths_over_the_cap_are_refused(pair):
    left, right = pair
    left.sendall(struct.pack(">I", channel.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(channel.ChannelClosed, match="over the cap"):
        channel.receive(right)
    with pytest.raises(ValueError, match="over the cap"):
        channel.pack({"prompt": "x" * channel.MAX_MESSAGE_BYTES})
