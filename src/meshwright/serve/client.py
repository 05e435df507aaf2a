"""A minimal client of each protocol, used by the demo and as an example."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import grpc

from meshwright.errors import Problem, RunFailed
from meshwright.serve.protocols import inference_pb2, inference_pb2_grpc


def stream_http(
    url: str, prompt: str, *, token: str | None = None, timeout_seconds: float = 60.0, **fields: Any
) -> Iterator[str]:
    """Pieces of text from POST /v1/completions of the server at `url`; `fields` are further fields of the request.

    Raises RunFailed with the server's message if it refuses or the stream breaks off.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_seconds)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    try:
        body = json.dumps({"prompt": prompt, "stream": True, **fields})
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RunFailed(Problem(url, json.loads(response.read())["error"]["message"]))
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise RunFailed(Problem(url, event["error"]["message"]))
            yield from (choice["text"] for choice in event["choices"] if choice["text"])
        raise RunFailed(Problem(url, "the stream broke off"))
    finally:
        connection.close()


def stream_grpc(
    target: str, prompt: str, *, model: str, token: str | None = None, timeout_seconds: float = 60.0, **fields: Any
) -> Iterator[str]:
    """Pieces of text from StreamPredictions of the server at `target` ("host:port"); `fields` as above.

    Raises RunFailed with the server's message if it refuses or the stream breaks off.
    """
    data = json.dumps({"prompt": prompt, **fields}).encode()
    request = inference_pb2.PredictionsRequest(model_name=model, input={"data": data})
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        try:
            for response in stub.StreamPredictions(request, metadata=metadata, timeout=timeout_seconds):
                yield response.prediction.decode()
        except grpc.RpcError as error:
            raise RunFailed(Problem(target, f"{error.code().name}: {error.details()}")) from error
