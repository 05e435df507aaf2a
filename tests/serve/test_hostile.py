"""Whatever is sent, the answer is never a 5xx and the server goes on."""

from __future__ import annotations

import http.client
import json
import math

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st

from meshwright.serve.errors import RequestError
from meshwright.serve.protocols.requests import UNSUPPORTED, ChatRequest, CompletionRequest, parse_object, read_request

CLIENT = httpx.Client(verify=False, timeout=60)  # one for all: making a client costs more than asking with it
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *UNSUPPORTED})
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, math.nan, math.inf])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "system", "x"]), "content": st.text(max_size=9) | VALUES}
    ),
    max_size=3,
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=5)
LIKELY = st.fixed_dictionaries(
    {"max_tokens": st.just(2) | VALUES},
    optional={"prompt": st.text(max_size=20) | VALUES, "messages": MESSAGES, "stream": st.booleans(), "stop": VALUES,
              "temperature": NUMBERS, "top_k": NUMBERS, "n": st.integers(-1, 3), "seed": NUMBERS},
)  # fmt: skip


@hypothesis.settings(max_examples=100, derandomize=True)
@hypothesis.given(body=BODIES | LIKELY, path=st.sampled_from(["completions", "chat/completions"]))
def test_no_body_makes_a_5xx(server, body, path):
    content = json.dumps(body).encode("utf-8", errors="surrogatepass")
    response = CLIENT.post(f"{server.url}/v1/{path}", content=content)
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert "Traceback" not in error["message"] and "0x7" not in error["message"]


@hypothesis.settings(max_examples=100, derandomize=True)
@hypothesis.given(content=st.binary(max_size=60))
def test_no_bytes_make_a_5xx(server, content):
    response = CLIENT.post(f"{server.url}/v1/completions", content=content)
    assert response.status_code == 400


@hypothesis.settings(max_examples=40, derandomize=True)
@hypothesis.given(content=st.binary(max_size=200))
def test_no_bytes_on_the_socket_hurt(server, content):
    with server.connect() as connection:
        connection.sendall(content)
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "application/x-pickle", "multipart/form-data; boundary=" + "-" * 5000]
)
def test_content_types_change_nothing(server, kind):
    pickled = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."
    response = CLIENT.post(server.url + "/v1/completions", content=pickled, headers={"content-type": kind})
    assert response.status_code == 400


def test_compressed_bodies_are_refused(server):
    """And their connection can be used again: closed with bytes unread it would reset the next request."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.connect()
    connection.auto_open = 0  # a closed connection is an error
    connection.request("POST", "/v1/completions", b"x" * 200_000, {"Content-Encoding": "gzip"})
    response = connection.getresponse()
    response.read()
    assert response.status == 400
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


@hypothesis.settings(max_examples=200, derandomize=True)
@hypothesis.given(body=BODIES | LIKELY)
def test_what_is_read_is_within_bounds(body):
    try:
        requests = read_request(CompletionRequest, parse_object(json.dumps(body).encode())).generations()
    except RequestError as error:
        assert error.status == 400
        return
    for request in requests:
        assert request.max_tokens is not None and request.max_tokens >= 1
        assert (
            0 <= request.temperature <= 2 and 0 < request.top_p <= 1 and 0 <= request.min_p <= 1 and request.top_k >= 0
        )
        assert all(type(token) is int and token >= 0 for token in request.prompt) or isinstance(request.prompt, str)
