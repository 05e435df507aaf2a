"""Who is let in: addresses, tokens, pages in a browser."""

from __future__ import annotations

import grpc
import httpx
import pytest
from google.protobuf import empty_pb2

from meshwright.errors import InputError
from meshwright.serve.access import Access, is_loopback, read_token
from meshwright.serve.protocols import inference_pb2, inference_pb2_grpc
from meshwright.serve.protocols.http import HttpEndpoints

TOKEN = "canary-0123456789abcdef"


def test_loopback_is_recognised():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST."))
    others = ("0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", "127.0.0.1.nip.io", "", "2130706433")
    assert not any(is_loopback(host) for host in others)


def test_other_addresses_need_a_token():
    for host in ("0.0.0.0", "::", "192.168.1.2", "my-host"):
        with pytest.raises(InputError, match=r"serve\.token_file"):
            Access(host, None)
        Access(host, TOKEN)


def test_token_file_must_be_private_and_long(tmp_path):
    path = tmp_path / "token"
    with pytest.raises(InputError, match="cannot read"):
        read_token(path)
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600") as caught:
        read_token(path)
    assert TOKEN not in str(caught.value)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    for content in ("short", "", "two words of enough length", "ünïcödé-ünïcödé-ünïcödé", "a" * 5000):
        path.write_text(content)
        with pytest.raises(InputError, match="does not hold one token"):
            read_token(path)
    with pytest.raises(InputError, match="not a regular file"):
        tmp_path.chmod(0o700)
        read_token(tmp_path)


@pytest.fixture
def locked(start, echo):
    return start(echo(), token=TOKEN)


ENDPOINTS = HttpEndpoints(None, None)  # type: ignore[arg-type]
ROUTES = sorted((route.path, method) for route in ENDPOINTS.routes() for method in route.methods)
WRONG = [{}, {"authorization": "Bearer"}, {"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN}x"},
         {"authorization": f"Basic {TOKEN}"}, {"authorization": f"Bearer {TOKEN[:-1]}"}]  # fmt: skip


def test_every_http_route_asks_for_the_token(locked):
    assert len(ROUTES) >= 12
    with httpx.Client(base_url=locked.url) as client:
        for path, method in [*ROUTES, ("/nothing", "GET"), ("/", "DELETE"), ("/health/", "GET"), ("//health", "GET")]:
            for headers in WRONG:
                response = client.request(method, path.replace("{name:path}", "echo"), headers=headers)
                if path == "/health":
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (method, path, headers)
                assert response.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in response.text
        good = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200


def test_every_grpc_method_asks_for_the_token(locked):
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceAPIsService"]
    request = inference_pb2.PredictionsRequest(model_name="echo", input={"data": b"ab"})
    with grpc.insecure_channel(locked.addresses.grpc) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        for method in service.methods:
            if method.name == "Ping":
                assert "Healthy" in stub.Ping(empty_pb2.Empty()).health
                continue
            call = getattr(stub, method.name)
            for headers in WRONG:
                with pytest.raises(grpc.RpcError) as caught:
                    answer = call(request, metadata=list(headers.items()))
                    list(answer) if method.server_streaming else answer
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            good = call(request, metadata=[("authorization", f"Bearer {TOKEN}")])
            assert (next(good) if method.server_streaming else good).prediction


def test_pages_of_other_sites_are_refused(server):
    own = f"http://127.0.0.1:{server.port}"
    client = httpx.Client(verify=False)
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        for headers in (
            {"host": "evil.example"},
            {"host": "evil.example:8000"},
            {"host": f"127.0.0.1.evil.example:{server.port}"},
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": f"http://localhost.evil.example:{server.port}"},
            {"origin": "http://127.0.0.1:1"},
        ):
            response = client.request(method, own + "/v1/models", headers=headers)
            assert response.status_code == 403, (method, headers)
    for headers in ({"host": "localhost"}, {"host": "[::1]:9"}, {"origin": own}):
        assert httpx.get(own + "/v1/models", headers=headers).status_code == 200


def test_requests_need_one_host(server):
    with server.connect() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
