"""HTTP/1.1 with limits on slow and on large requests, based on uvicorn's h11 protocol."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from meshwright.serve.errors import bad_request

MAX_HEAD_BYTES = 16 << 10
HEAD_SECONDS = 10.0
STALLED_WRITE_SECONDS = 30.0
MAX_RAW_REQUEST_BYTES = 24 << 20


class BoundedProtocol(H11Protocol):
    """One connection. A request's head must arrive within HEAD_SECONDS. A client that does not read its answer for
    STALLED_WRITE_SECONDS is disconnected, which frees its slots. The bytes of a request, chunk framing included, are
    limited, so that megabytes of one-byte chunks do not keep the event loop busy.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _raw_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._raw_bytes += len(data)
        if self._raw_bytes > MAX_RAW_REQUEST_BYTES:
            self.transport.abort()
            return
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._raw_bytes = 0
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if unread:  # answered before the end of the body, which will not be read
            self.transport.close()
        elif self.cycle is None or self.cycle.response_complete:
            self._await_head()

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALLED_WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """An error in the format of all others. A connection that is already answering is only closed."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(bad_request("not a valid HTTP/1.1 request", code="invalid_http").as_dict()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
