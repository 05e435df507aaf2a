"""gRPC with the generated stub, on real sockets."""

from __future__ import annotations

import json

import grpc
import pytest
from google.protobuf import empty_pb2

from meshwright.serve.client import stream_grpc, stream_http
from meshwright.serve.protocols import inference_pb2, inference_pb2_grpc


def stub_of(channel):
    return inference_pb2_grpc.InferenceAPIsServiceStub(channel)


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        yield stub_of(channel)


def request(data: bytes | str = b"abc", model: str = "echo", **fields):
    data = data.encode() if isinstance(data, str) else data
    return inference_pb2.PredictionsRequest(model_name=model, input={"data": data}, **fields)


def test_the_service_is_torchserves():
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceAPIsService"]
    assert service.full_name == "org.pytorch.serve.grpc.inference.InferenceAPIsService"
    assert [method.name for method in service.methods] == ["Ping", "Predictions", "StreamPredictions"]
    numbers = {f.name: f.number for f in inference_pb2.PredictionsRequest.DESCRIPTOR.fields}
    assert numbers == {"model_name": 1, "model_version": 2, "input": 3, "sequence_id": 4}
    numbers = {f.name: f.number for f in inference_pb2.PredictionResponse.DESCRIPTOR.fields}
    assert numbers == {"prediction": 1, "sequence_id": 2, "status": 3}


def test_ping(stub):
    assert json.loads(stub.Ping(empty_pb2.Empty()).health) == {"status": "Healthy"}


def test_predictions_of_a_plain_prompt(stub):
    assert stub.Predictions(request("né ")).prediction.decode() == "né né né né "


def test_a_byte_order_mark_is_no_part_of_the_data(stub):
    for data in ("né ", '{"prompt": "né "}'):
        assert stub.Predictions(request(b"\xef\xbb\xbf" + data.encode())).prediction.decode() == "né né né né "


def test_predictions_of_a_json_object(stub):
    body = json.dumps({"prompt": "abc", "max_tokens": 5, "model": "echo"})
    response, call = stub.Predictions.with_call(request(body))
    assert response.prediction == b"abcab"
    trailer = dict(call.trailing_metadata())
    assert (trailer["finish-reason"], trailer["prompt-tokens"], trailer["completion-tokens"]) == ("length", "3", "5")


def test_stream_comes_in_pieces_of_whole_characters(stub):
    body = json.dumps({"prompt": "😀é", "max_tokens": 12})
    pieces = [response.prediction.decode() for response in stub.StreamPredictions(request(body))]
    assert pieces == ["😀", "é", "😀", "é"]


BAD = [
    (request(model="other"), "NOT_FOUND", "echo"),
    (request(model=""), "NOT_FOUND", "echo"),
    (request(model_version="2.0"), "NOT_FOUND", "1.0"),
    (request(sequence_id="s"), "INVALID_ARGUMENT", "sequence_id"),
    (inference_pb2.PredictionsRequest(model_name="echo"), "INVALID_ARGUMENT", "'data'"),
    (inference_pb2.PredictionsRequest(model_name="echo", input={"dat": b"x"}), "INVALID_ARGUMENT", "mean 'data'"),
    (request(b""), "INVALID_ARGUMENT", "empty"),
    (request(b"\xff\xfe"), "INVALID_ARGUMENT", "'data' is not UTF-8 text but UTF-16"),
    (request("a".encode("utf-16-le")), "INVALID_ARGUMENT", "'data' holds NUL bytes"),
    (request(b"\x80"), "INVALID_ARGUMENT", "'data' is not UTF-8"),
    (request("{not json"), "INVALID_ARGUMENT", "begins with {"),
    (request('{"promt": "a"}'), "INVALID_ARGUMENT", "did you mean 'prompt'"),
    (request('{"prompt": "a", "n": 2}'), "INVALID_ARGUMENT", "n = 1"),
    (request('{"prompt": "a", "stream": 1}'), "INVALID_ARGUMENT", "stream"),
    (request('{"prompt": "a", "model": "x"}'), "NOT_FOUND", "echo"),
    (request("a" * 5000), "INVALID_ARGUMENT", "room for 4096"),
    (request("a" * (3 << 20)), "RESOURCE_EXHAUSTED", "larger"),
]


@pytest.mark.parametrize(("message", "status", "words"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
def test_bad_calls_get_their_status(stub, message, status, words, method):
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamPredictions(message)) if method == "StreamPredictions" else stub.Predictions(message)
    assert caught.value.code().name == status
    assert words in caught.value.details()


def test_unknown_methods_are_unimplemented(server):
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Explanations")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("how", ["cancel", "deadline", "connection"])
def test_call_that_ends_early_frees_its_slot(start, echo, until, how):
    engine = echo(step_seconds=0.005, max_len=1 << 20)
    server = start(engine)
    body = json.dumps({"prompt": "ab", "max_tokens": 1_000_000})
    channel = grpc.insecure_channel(server.addresses.grpc)
    call = stub_of(channel).StreamPredictions(request(body), timeout=2 if how == "deadline" else None)
    assert next(call).prediction == b"a"
    assert len(engine.requests) == 1
    if how == "cancel":
        call.cancel()
    elif how == "connection":
        channel.close()
    until(lambda: engine.requests == {})
    until(lambda: server.model.open_choices == 0)
    channel.close()
    assert list(stream_grpc(server.addresses.grpc, "ab", model="echo", max_tokens=2)) == ["a", "b"]


def test_whole_prediction_that_is_cancelled_frees_its_slot(start, echo, until):
    engine = echo(step_seconds=0.005, max_len=1 << 20)
    server = start(engine)
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        future = stub_of(channel).Predictions.future(request('{"prompt": "ab", "max_tokens": 100000}'))
        until(lambda: len(engine.requests) == 1)
        future.cancel()
        until(lambda: engine.requests == {})


def test_full_queue_is_resource_exhausted(start, echo, until):
    engine = echo(step_seconds=0.005, max_batch=1, max_len=1 << 20)
    server = start(engine)
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        stub = stub_of(channel)
        long = [stub.Predictions.future(request('{"prompt": "ab", "max_tokens": 100000}')) for _ in range(9)]
        until(lambda: server.model.open_choices == 9)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predictions(request("a"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for future in long:
            future.cancel()


def test_failed_step_is_internal_without_details(start, echo):
    server = start(echo(fail_next_steps=1))
    with grpc.insecure_channel(server.addresses.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        stub_of(channel).Predictions(request("a"))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "0x" not in caught.value.details() and "/" not in caught.value.details()


def test_the_two_small_clients_agree(server):
    fields = {"max_tokens": 9}
    by_http = list(stream_http(server.url, "abcd", **fields))
    by_grpc = list(stream_grpc(server.addresses.grpc, "abcd", model="echo", **fields))
    assert by_http == by_grpc == list("abcdabcda")
