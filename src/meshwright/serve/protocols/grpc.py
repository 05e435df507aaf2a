"""gRPC: TorchServe's inference service (see inference.proto), on grpc.aio."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import empty_pb2

from meshwright.errors import nearest_name
from meshwright.serve.access import Access, TokenInterceptor
from meshwright.serve.errors import RequestError, bad_request
from meshwright.serve.protocols import inference_pb2, inference_pb2_grpc
from meshwright.serve.protocols.requests import CompletionRequest, parse_object, read_request, text_of
from meshwright.serve.workers.served_model import Reply, ServedModel

log = logging.getLogger(__name__)

#: TorchServe's default version of a model.
ONLY_VERSION = "1.0"
MAX_MESSAGE_BYTES = 2 << 20
MAX_METADATA_BYTES = 16 << 10
MAX_STREAMS = 512


def grpc_server(model: ServedModel, access: Access) -> grpc.aio.Server:
    """A server with the service, not yet bound or started. It must be created inside the event loop."""
    server = grpc.aio.server(
        interceptors=[TokenInterceptor(access)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
            ("grpc.http2.max_ping_strikes", 2),
        ],
        maximum_concurrent_rpcs=MAX_STREAMS,
    )
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(Inference(model), server)
    return server


class Inference(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """The service. When a client cancels a call or its connection ends, the engine's slot is free at once."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def Ping(
        self, request: empty_pb2.Empty, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TorchServeHealthResponse:
        status = "Healthy" if self._model.healthy else "Unhealthy"
        return inference_pb2.TorchServeHealthResponse(health=json.dumps({"status": status}))

    async def Predictions(
        self, request: inference_pb2.PredictionsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.PredictionResponse:
        text: list[str] = []

        async def append(piece: str) -> None:
            text.append(piece)

        await self._run("Predictions", request, context, append)
        return inference_pb2.PredictionResponse(prediction="".join(text).encode())

    async def StreamPredictions(
        self, request: inference_pb2.PredictionsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        async def send(piece: str) -> None:
            await context.write(inference_pb2.PredictionResponse(prediction=piece.encode()))

        await self._run("StreamPredictions", request, context, send)

    async def _run(
        self,
        method: str,
        request: inference_pb2.PredictionsRequest,
        context: grpc.aio.ServicerContext,
        emit: Callable[[str], Awaitable[None]],
    ) -> None:
        """Runs one call and passes its text to `emit` in pieces. A RequestError becomes the status of the call."""
        reply: Reply | None = None
        status = "CANCELLED"
        try:
            completion = read_prediction(request, self._model, streaming=method == "StreamPredictions")
            reply = self._model.submit(completion.generations())
            await reply.accepted()
            tokens, reason = 0, ""
            async for _, piece in reply:
                tokens += piece.tokens
                reason = piece.finish_reason or reason
                if piece.text:
                    await emit(piece.text)
            context.set_trailing_metadata(_trailer(reply, tokens, reason))
            status = "OK"
        except RequestError as error:
            status = error.grpc_status
            await context.abort(getattr(grpc.StatusCode, status), error.message)
        except Exception as error:
            status = "INTERNAL"
            log.error("a call failed", exc_info=error)
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed to answer this call")
        finally:
            if reply is not None:
                reply.cancel()
            self._model.metrics.requests.labels("grpc", method, status).inc()


def _trailer(reply: Reply, tokens: int, reason: str) -> tuple[tuple[str, str], ...]:
    return (
        ("finish-reason", reason),
        ("prompt-tokens", str(sum(reply.prompt_tokens))),
        ("completion-tokens", str(tokens)),
    )


def read_prediction(
    request: inference_pb2.PredictionsRequest, model: ServedModel, *, streaming: bool
) -> CompletionRequest:
    """The request of a call. Raises RequestError 404 for another model, 400 for a malformed request."""
    model.check_name(request.model_name)
    if request.model_version not in ("", ONLY_VERSION):
        raise RequestError(404, f"no such version; '{model.name}' has '{ONLY_VERSION}'", code="model_not_found")
    if request.HasField("sequence_id"):
        raise bad_request("sequence_id: sequences that keep state are not supported", param="sequence_id")
    for name in request.input:
        if name != "data":
            raise bad_request(f"unknown input '{name[:64]}'; {nearest_name(name, ['data'])}", param="input")
    if "data" not in request.input:
        raise bad_request("input needs 'data': a prompt, or a JSON object with a prompt", param="input")
    completion = read_request(CompletionRequest, _fields(request.input["data"]))
    if completion.model is not None:
        model.check_name(completion.model)
    if completion.stream is not None and completion.stream is not streaming:
        raise bad_request("stream is chosen by the method: Predictions or StreamPredictions", param="stream")
    if completion.stream_options is not None:
        raise bad_request(
            "stream_options has no meaning here: usage comes as trailing metadata", param="stream_options"
        )
    if len(completion.generations()) != 1:
        raise bad_request("a call takes one prompt and n = 1", param="n")
    return completion


def _fields(data: bytes) -> dict[str, Any]:
    """The fields of `data`, a JSON object if it begins with {, else a prompt."""
    text = text_of(data, "'data'", param="data")
    if text.lstrip()[:1] != "{":
        return {"prompt": text}
    try:
        return parse_object(data)
    except RequestError as error:
        message = error.message.replace("the body", "'data'") + '; a prompt that begins with { goes as {"prompt": ...}'
        raise bad_request(message, param="data", code=error.code) from None
