"""Access control: the address that is bound, the bearer token, and protection against pages in a browser."""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from meshwright.errors import InputError, Problem
from meshwright.serve.errors import RequestError

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_BYTES = 4096

#: These need no token, for health checks, and return nothing else.
OPEN_HTTP_PATHS = frozenset({"/health"})
OPEN_GRPC_METHODS = frozenset({"/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping"})


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, always means this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """The token in a file. Raises InputError unless only its owner can read it and the token is long enough."""
    where = "serve.token_file"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(Problem(where, f"cannot read {path}: {error.strerror}")) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(Problem(where, f"{path} is not a regular file"))
        if mode & 0o077:
            what = f"others can read or write {path} (mode {mode & 0o777:04o})"
            raise InputError(Problem(where, what, f"chmod 600 {path}"))
        content = os.read(descriptor, MAX_TOKEN_BYTES + 1)
    finally:
        os.close(descriptor)
    token = content.decode("ascii", errors="replace").strip()
    if not MIN_TOKEN_CHARACTERS <= len(token) <= MAX_TOKEN_BYTES or not all("!" <= c <= "~" for c in token):
        what = f"{path} does not hold one token of at least {MIN_TOKEN_CHARACTERS} printable ASCII characters"
        raise InputError(Problem(where, what, f"openssl rand -hex 32 > {path}"))
    return token


class Access:
    """The rules of one server. With a token every request but health needs it. Without one, which only loopback allows,
    requests that a page of another site may have made are refused.
    """

    def __init__(self, host: str, token: str | None) -> None:
        if token is None and not is_loopback(host):
            raise InputError(
                Problem(
                    "serve.host",
                    f"'{host}' can be reached from other machines and no token is set",
                    "set serve.token_file, or serve.host=127.0.0.1",
                )
            )
        self._token = None if token is None else token.encode()

    def check_http(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises RequestError 400, 401 or 403 for a request that is refused. `headers` have lower-case names."""
        values: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            values.setdefault(name, []).append(value)
        if len(values.get(b"host", [])) != 1:
            raise RequestError(400, "a request needs one Host header", code="bad_host")
        if b"transfer-encoding" in values and b"content-length" in values:
            raise RequestError(400, "Content-Length and Transfer-Encoding contradict each other", code="bad_framing")
        host = values[b"host"][0].decode("latin-1")
        if self._token is None and not is_loopback(_host_name(host)):
            # A foreign name that resolves to this machine: a page whose site rebinds its name (DNS rebinding).
            raise RequestError(403, "the Host header does not name this machine", code="bad_host")
        for origin in values.get(b"origin", []):
            if _origin_host(origin.decode("latin-1")) != host.lower():
                raise RequestError(403, "requests from other sites' pages are refused", code="bad_origin")
        if path not in OPEN_HTTP_PATHS:
            self._check_token(values.get(b"authorization", []))

    def check_grpc(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Raises RequestError 401 for a call that is refused."""
        if method not in OPEN_GRPC_METHODS:
            values = [value for name, value in metadata if name == "authorization"]
            self._check_token([value.encode() if isinstance(value, str) else value for value in values])

    def _check_token(self, values: list[bytes]) -> None:
        if self._token is None:
            return
        scheme, _, token = (values[0] if len(values) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise RequestError(401, "a valid bearer token is needed", code="invalid_token")


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host


def _origin_host(origin: str) -> str | None:
    """host[:port] of an Origin header in lower case; None for "null" and for a malformed one."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") and parts.netloc else None


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Checks access before any method runs, so that no method can forget it."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        try:
            self._access.check_grpc(handler_call_details.method, handler_call_details.invocation_metadata or ())
        except RequestError as error:
            return _error_handler(handler, error)
        return handler


def _error_handler(handler: Any, error: RequestError) -> grpc.RpcMethodHandler:
    """A handler of the same shape as `handler` that answers with `error`."""
    status = getattr(grpc.StatusCode, error.grpc_status)

    async def fail(_: Any, context: grpc.aio.ServicerContext) -> Any:
        await context.abort(status, error.message)

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(fail, handler.request_deserializer, handler.response_serializer)
