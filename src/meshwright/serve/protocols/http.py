"""HTTP: OpenAI's completions and chat, and health, metrics and version."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import meshwright
from meshwright.serve.access import Access
from meshwright.serve.errors import RequestError, bad_request
from meshwright.serve.protocols.answers import CHAT, COMPLETION, Answer, event_bytes
from meshwright.serve.protocols.requests import ChatRequest, CompletionRequest, parse_object, read_request
from meshwright.serve.workers.chat import Renderer
from meshwright.serve.workers.served_model import Reply, ServedModel

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 << 20
DISCARD_BYTES = 8 << 20
BODY_SECONDS = 20.0


def http_app(model: ServedModel, renderer: Renderer, access: Access) -> ASGIApp:
    """All of HTTP as one ASGI application."""
    endpoints = HttpEndpoints(model, renderer)
    inner = Starlette(
        routes=endpoints.routes(),
        exception_handlers={RequestError: _request_error, HTTPException: _no_route, Exception: _internal_error},  # type: ignore[dict-item]
    )
    return AccessMiddleware(inner, model, access, {route.path for route in endpoints.routes()})


class AccessMiddleware:
    """Checks access before routing, and counts requests by route and status."""

    def __init__(self, inner: ASGIApp, model: ServedModel, access: Access, paths: set[str]) -> None:
        self._inner = inner
        self._model = model
        self._access = access
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        route = path if path in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._model.metrics.requests.labels("http", route, str(message["status"])).inc()
            await send(message)

        try:
            self._access.check_http(path, scope["headers"])
        except RequestError as error:
            await _response(error, close=True)(scope, receive, counted)
            return
        await self._inner(scope, receive, counted)


class HttpEndpoints:
    """The functions of the routes."""

    def __init__(self, model: ServedModel, renderer: Renderer) -> None:
        self._model = model
        self._renderer = renderer

    def routes(self) -> list[Route]:
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
        ]

    async def completions(self, request: Request) -> Response:
        body = read_request(CompletionRequest, parse_object(await read_body(request)))
        _check_stream_options(body)
        self._model.check_name(body.model)
        reply = self._model.submit(body.generations())
        answer = Answer(COMPLETION, f"cmpl-{uuid.uuid4().hex}", self._model, body.n or 1)
        return await self._answer(request, body, reply, answer)

    async def chat(self, request: Request) -> Response:
        body = read_request(ChatRequest, parse_object(await read_body(request)))
        _check_stream_options(body)
        self._model.check_name(body.model)
        with self._model.reserve(body.n or 1):
            prompt = await self._renderer.render(body.plain_messages())
        reply = self._model.submit(body.generations(prompt, add_special=not self._renderer.template.own))
        answer = Answer(CHAT, f"chatcmpl-{uuid.uuid4().hex}", self._model, body.n or 1)
        return await self._answer(request, body, reply, answer)

    async def _answer(
        self, request: Request, body: CompletionRequest | ChatRequest, reply: Reply, answer: Answer
    ) -> Response:
        if not body.stream:
            return await _unless_disconnected(request, reply, answer)
        try:
            await reply.accepted()  # before the header is sent, so that an error gets its status
        except BaseException:
            reply.cancel()
            raise
        return EventStream(reply, answer, include_usage=body.include_usage)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        self._model.check_name(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        model = self._model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "meshwright",
            "max_model_len": model.max_len,
        }

    async def health(self, _: Request) -> Response:
        healthy = self._model.healthy
        return JSONResponse({"status": "healthy" if healthy else "unhealthy"}, status_code=200 if healthy else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._model.metrics.as_text(), media_type="text/plain; version=0.0.4")

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": meshwright.__version__})


class EventStream(Response):
    """Server-sent events. When the client disconnects, the engine's slots are free at once, even between tokens."""

    def __init__(self, reply: Reply, answer: Answer, *, include_usage: bool) -> None:
        super().__init__(headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        del self.headers["content-length"]
        self._reply = reply
        self._answer = answer
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._reply.cancel()
            await _end(sending, leaving)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._answer.events(self._reply, include_usage=self._include_usage):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except RequestError as error:  # too late for a status: send an error event and no [DONE]
            await send({"type": "http.response.body", "body": event_bytes(error.as_dict()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_disconnected(request: Request, reply: Reply, answer: Answer) -> Response:
    """The whole answer, unless the client disconnects first, which frees the engine's slots at once."""
    working = asyncio.create_task(answer.whole(reply))
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return JSONResponse(working.result())
        raise RequestError(499, "the client left", code="client_left")
    finally:
        reply.cancel()
        await _end(working, leaving)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_stream_options(body: CompletionRequest | ChatRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", param="stream_options")


async def read_body(request: Request) -> bytes:
    """The request's body. Raises RequestError 413 above MAX_BODY_BYTES and 408 after BODY_SECONDS.

    DISCARD_BYTES beyond the limit are read and dropped, so that a client that reads only after writing gets the 413 and
    not a reset connection.
    """
    too_large = RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES + DISCARD_BYTES:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(499, "the client left", code="client_left")
                part = message.get("body", b"")
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    body += part
                if not message.get("more_body", False) or size > MAX_BODY_BYTES + DISCARD_BYTES:
                    break
    except TimeoutError:
        raise RequestError(408, f"the body took longer than {BODY_SECONDS:g} s", code="slow_body") from None
    if size > MAX_BODY_BYTES:
        raise too_large
    # Refused only once it is read: a connection closed with bytes unread resets the request that comes next on it.
    if request.headers.get("content-encoding", "identity") != "identity":
        raise bad_request("compressed bodies are not supported", code="unsupported_encoding")
    return bytes(body)


def _response(error: RequestError, *, close: bool = False) -> JSONResponse:
    headers = {"connection": "close"} if close or error.status in (408, 413) else {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    # 499 is not a status of HTTP; the client has disconnected and will not read it.
    return JSONResponse(error.as_dict(), status_code=400 if error.status == 499 else error.status, headers=headers)


async def _request_error(_: Request, error: RequestError) -> Response:
    return _response(error)


async def _no_route(_: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        return _response(RequestError(405, "this route does not take that method", code="bad_method"))
    return _response(RequestError(404, "no such route", code="unknown_route"))


async def _internal_error(_: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _response(RequestError(500, "the server failed to answer this request", code="internal"))
