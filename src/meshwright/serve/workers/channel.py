"""Messages between the server and the engine's process: JSON objects behind a four-byte length, on a private socket.

To the engine                                        From the engine
    submit  {op, id, prompt, add_special, ...}           ready    {op, model, max_len, max_batch}
    cancel  {op, id}                                     accepted {op, id, prompt_tokens}
    stop    {op}                                         refused  {op, id, status, code, message, param}
                                                         events   {op, active, waiting, events: [[id, text, tokens,
                                                                   finish_reason or null], ...]}
                                                         lost     {op}  the last message: the engine ends
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

#: Larger than any body that the protocols accept, so that only a bug of ours can exceed it.
MAX_MESSAGE_BYTES = 32 << 20

_LENGTH = struct.Struct(">I")


class ChannelClosed(Exception):
    """The other side is gone."""


def pack(message: dict[str, Any]) -> bytes:
    """A message as bytes for the socket."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the cap of {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


def _unpack_length(head: bytes) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE_BYTES:
        raise ChannelClosed(f"a message of {length} bytes is over the cap of {MAX_MESSAGE_BYTES}")
    return int(length)


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise ChannelClosed("the server closed the channel")
        parts += part
    return bytes(parts)


def receive(connection: socket.socket) -> dict[str, Any]:
    """The next message of a blocking socket. Raises ChannelClosed at its end."""
    try:
        length = _unpack_length(_receive_exactly(connection, _LENGTH.size))
        message: dict[str, Any] = json.loads(_receive_exactly(connection, length))
    except OSError as error:
        raise ChannelClosed(str(error)) from error
    return message


async def receive_async(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message of a stream. Raises ChannelClosed at its end."""
    try:
        length = _unpack_length(await reader.readexactly(_LENGTH.size))
        message: dict[str, Any] = json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError) as error:
        raise ChannelClosed("the engine's process closed the channel") from error
    return message
