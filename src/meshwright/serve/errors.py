"""`RequestError`, and the table of its codes in each protocol."""

from __future__ import annotations

from typing import Any

#: HTTP status -> (OpenAI error type, gRPC status name). The gRPC names are TorchServe's.
STATUS: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "INVALID_ARGUMENT"),
    401: ("authentication_error", "UNAUTHENTICATED"),
    403: ("permission_error", "PERMISSION_DENIED"),
    404: ("not_found_error", "NOT_FOUND"),
    405: ("invalid_request_error", "UNIMPLEMENTED"),
    408: ("timeout_error", "DEADLINE_EXCEEDED"),
    413: ("invalid_request_error", "RESOURCE_EXHAUSTED"),
    429: ("overloaded_error", "RESOURCE_EXHAUSTED"),
    499: ("cancelled", "CANCELLED"),
    500: ("server_error", "INTERNAL"),
    503: ("server_error", "UNAVAILABLE"),
}


class RequestError(Exception):
    """A request that gets an error instead of an answer.

    `status` is an HTTP status of `STATUS`; `message` is sent to the client, so it contains no path, address or
    traceback; `param` names the field at fault; `code` is a stable word for programs; `retry_after_seconds` is set
    where a retry makes sense.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    @property
    def grpc_status(self) -> str:
        return STATUS[self.status][1]

    def as_dict(self) -> dict[str, Any]:
        """The body of the error in OpenAI's format."""
        kind = STATUS[self.status][0]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> RequestError:
    """A 400: the request itself is wrong."""
    return RequestError(400, message, code=code, param=param)


def overloaded(message: str) -> RequestError:
    """A 429: the queue is full; retry after a second."""
    return RequestError(429, message, code="overloaded", retry_after_seconds=1)


def unavailable(message: str) -> RequestError:
    """A 503: the server is stopping, or its engine is gone."""
    return RequestError(503, message, code="unavailable", retry_after_seconds=5)
