"""HTTP on real sockets, with OpenAI's own client and with raw bytes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
from typing import Any

import httpx
import openai
import pytest


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def post(server, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60)


def raw(server, head: str, body: bytes = b"") -> bytes:
    """Sends bytes as they are, returns all that comes until the server closes."""
    with server.connect() as connection:
        connection.sendall(head.encode("latin-1") + body)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def events(response_body: bytes) -> list[Any]:
    """Payloads of server-sent events, each checked to be `data: ...` and an empty line, to the byte."""
    assert response_body.endswith(b"\n\n")
    out = []
    for block in response_body[:-2].split(b"\n\n"):
        assert block.startswith(b"data: ") and b"\n" not in block
        data = block.removeprefix(b"data: ")
        out.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return out


def test_completion_through_openai_client(client):
    answer = client.completions.create(model="echo", prompt="abc", max_tokens=7)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "abcabca"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)


def test_completion_stream_through_openai_client(client):
    stream = client.completions.create(model="echo", prompt="héllo ", max_tokens=14, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "héllo héllo "
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len(chunks) > 3


def test_chat_through_openai_client(client):
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="echo", messages=messages, max_completion_tokens=15)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "system: be brie"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = client.chat.completions.create(model="echo", messages=parts, max_tokens=9)
    assert answer.choices[0].message.content == "user: a\nb"


def test_chat_stream_helper_of_openai_client(client):
    messages: Any = [{"role": "user", "content": "hi\x04"}]
    with client.chat.completions.stream(model="echo", messages=messages) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "user: hi"


def test_chat_stream_to_the_byte(server):
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = post(server, "/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.content)
    assert found[-1] == "[DONE]"
    chunks = found[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "user"


def test_stream_without_usage_has_no_usage_field(server):
    response = post(server, "/v1/completions", {"prompt": "ab", "max_tokens": 2, "stream": True})
    found = events(response.content)
    assert all("usage" not in event for event in found[:-1])
    assert found[-1] == "[DONE]"


def test_characters_are_never_split(server):
    response = post(server, "/v1/completions", {"prompt": "😀é", "max_tokens": 12, "stream": True})
    texts = [event["choices"][0]["text"] for event in events(response.content)[:-1]]
    assert "".join(texts) == "😀é😀é"
    assert "\ufffd" not in "".join(texts)


def test_stop_strings_and_end_token(server):
    answer = post(server, "/v1/completions", {"prompt": "abcdef", "max_tokens": 50, "stop": ["de", "zz"]}).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "stop"
    special = post(server, "/v1/completions", {"prompt": "ab\x06cd", "max_tokens": 9, "stop": ["b<|six|>c"]}).json()
    assert special["choices"][0]["text"] == "a" and special["choices"][0]["finish_reason"] == "stop"
    unseen = post(server, "/v1/completions", {"prompt": "ab\x06cd", "max_tokens": 7, "stop": ["six|>x"]}).json()
    assert unseen["choices"][0]["text"] == "abcdab"
    ended = post(server, "/v1/completions", {"prompt": "ab\x04", "max_tokens": 50}).json()
    assert ended["choices"][0] == {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}
    ignored = post(server, "/v1/completions", {"prompt": "ab\x04", "max_tokens": 5, "ignore_eos": True}).json()
    assert ignored["choices"][0]["text"] == "ab\x04ab"


def test_several_prompts_and_choices(server):
    answer = post(server, "/v1/completions", {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 3, "seed": 5}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["aba", "aba", "cdc", "cdc"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4
    seeds = [request.seed for request in server.engine.submitted[-4:]]
    assert seeds == [5, 6, 7, 8]
    by_ids = post(server, "/v1/completions", {"prompt": [[97, 98], [99]], "max_tokens": 2}).json()
    assert [choice["text"] for choice in by_ids["choices"]] == ["ab", "cc"]


def test_every_field_reaches_the_engine(server):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "ignore_eos": True}
    body = {"model": "echo", "prompt": "x", "max_tokens": 2, "n": 1, "user": "me", **fields}
    assert post(server, "/v1/completions", body).status_code == 200
    request = server.engine.submitted[-1]
    assert {name: getattr(request, name) for name in fields} == fields
    post(server, "/v1/completions", {"prompt": "x"})
    request = server.engine.submitted[-1]
    assert (request.max_tokens, request.temperature, request.top_p, request.top_k) == (16, 1.0, 1.0, 0)


def test_chat_without_a_limit_fills_the_context(server):
    answer = post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 4000}]}).json()
    assert answer["usage"]["total_tokens"] == server.engine.max_len


def test_models_health_version_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"
    assert httpx.get(server.url + "/health").json() == {"status": "healthy"}
    assert "version" in httpx.get(server.url + "/version").json()
    text = httpx.get(server.url + "/metrics").text
    assert 'meshwright_model_info{model="echo"} 1.0' in text
    assert "meshwright_generated_tokens_total" in text


BAD_BODIES = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "not a JSON object"),
    (b"\xff\xfe", "not UTF-8 text but UTF-16"),
    ('{"prompt": "a"}'.encode("utf-16-le"), "NUL bytes, so it is UTF-16"),
    (b"\x80\x04\x95\x10\x00\x00\x00.", "no text"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "a", "prompt": "b"}', "twice"),
    (b'{"prompt": "\\ud800"}', "Unicode"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "too long"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    (b'{"prompt": ' + b"[" * 20 + b"1" + b"]" * 20 + b"}", "nested"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bodies_that_are_not_requests(server, body, words):
    response = post(server, "/v1/completions", body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_a_byte_order_mark_is_no_part_of_a_body(server):
    response = post(server, "/v1/completions", b'\xef\xbb\xbf{"prompt": "ab", "max_tokens": 2}')
    assert response.json()["choices"][0]["text"] == "ab"


BAD_FIELDS = [
    ({"promt": "a"}, "promt", "did you mean 'prompt'"),
    ({"prompt": "a", "temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"prompt": "a", "tools": [{}]}, "tools", "not supported"),
    ({"prompt": "a", "logit_bias": {"1": 2}}, "logit_bias", "not supported"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"prompt": "a", "echo": True}, "echo", "not supported"),
    ({"prompt": "a", "logprobs": 0}, "logprobs", "not supported"),
    ({}, "prompt", "required"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "must be"),
    ({"prompt": [[]]}, "prompt", "must be"),
    ({"prompt": ["a", 1]}, "prompt", "must be"),
    ({"prompt": [True]}, "prompt", "must be"),
    ({"prompt": [-1]}, "prompt", "ids are 0"),
    ({"prompt": [256]}, "prompt", "ids are 0 to 255"),
    ({"prompt": [1 << 70]}, "prompt", "ids are 0"),
    ({"prompt": 5}, "prompt", "must be"),
    ({"prompt": ["a"] * 65}, "prompt", "64"),
    ({"prompt": "a" * 5000}, "prompt", "room for 4096"),
    ({"prompt": "a", "max_tokens": 4096}, "max_tokens", "at most 4095"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "integer"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
    ({"prompt": "a", "max_tokens": 1 << 40}, "max_tokens", "less"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "greater"),
    ({"prompt": "a", "temperature": True}, "temperature", "number"),
    ({"prompt": "a", "temperature": 1e300}, "temperature", "less"),
    ({"prompt": "a", "top_p": 0}, "top_p", "greater"),
    ({"prompt": "a", "top_k": -2}, "top_k", "greater"),
    ({"prompt": "a", "n": 0}, "n", "greater"),
    ({"prompt": ["a"] * 10, "n": 10}, "n", "at most 64"),
    ({"prompt": ["a"] * 40}, "n", "at most 36"),
    ({"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "stop", "4"),
    ({"prompt": "a", "stop": ""}, "stop.0", "1 character"),
    ({"prompt": "a", "seed": -1}, "seed", "greater"),
    ({"prompt": "a", "stream": "yes"}, "stream", "bool"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "usage", "known: include_usage"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_fields_are_checked_by_name(server, body, param, words):
    response = post(server, "/v1/completions", body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "contents"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "name"),
    ({"messages": [{"role": "user", "content": "x", "nickname": None}]}, "nickname"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
        "cache_control",
    ),
    ({"messages": [{"role": "user", "content": "x"}], "prompt": "y"}, "prompt"),
    ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    (
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs",
    ),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_chats_are_checked_by_name(server, body, param):
    response = post(server, "/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_fields_that_ask_for_nothing_pass(server):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "tools": [], "logprobs": None}
    assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, **neutral}).status_code == 200


def test_nested_fields_that_ask_for_nothing_pass(server, client):
    asked: Any = {"role": "user", "content": [{"type": "text", "text": "hi", "annotations": [], "cache_control": None}]}
    answer = client.chat.completions.create(model="echo", messages=[asked], max_tokens=3).choices[0].message
    assert answer.refusal is None and answer.tool_calls is None  # as the client dumps them, with all the others
    dumped = {"annotations": None, "audio": None, "function_call": None, **answer.model_dump(), "name": None}
    for extra in ({}, {"tool_calls": [], "annotations": []}):
        body = {"messages": [asked, dumped | extra, asked], "max_tokens": 1, "stream": True,
                "stream_options": {"include_usage": None, "include_obfuscation": False}}  # fmt: skip
        assert post(server, "/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_is_counted_once_whatever_n_is(server, stream):
    def counted(path: str, **fields: Any) -> tuple[int, int]:
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        response = post(server, path, {"max_tokens": 2, **fields, **options})
        usage = (events(response.content)[-2] if stream else response.json())["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        return usage["prompt_tokens"], usage["completion_tokens"]

    assert counted("/v1/completions", prompt="abc", n=3) == (3, 6)
    assert counted("/v1/completions", prompt=["a", "bcde"], n=2) == (5, 8)
    assert counted("/v1/completions", prompt=["ab", "ab"]) == (4, 4)  # two prompts, though equal
    messages = [{"role": "user", "content": "hi"}]
    alone, _ = counted("/v1/chat/completions", messages=messages)
    assert counted("/v1/chat/completions", messages=messages, n=3) == (alone, 6)


def test_ends_of_lines_in_a_text_do_not_end_the_line_of_an_event(server):
    text = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\x1d\x1e\r\n\u00e9"
    body = {"prompt": text, "max_tokens": len(text.encode()), "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]  # by str.splitlines
    assert lines.pop() == "data: [DONE]"
    assert "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines) == text


def test_unknown_model_route_and_method(server):
    response = post(server, "/v1/completions", {"model": "../../etc/passwd", "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.get(server.url + "/v1/models/other").status_code == 404
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["code"] == "unknown_route"
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    assert httpx.get(server.url + "/v1/models/%2e%2e%2fsecret").status_code == 404


def test_large_bodies_get_413(server):
    response = post(server, "/v1/completions", {"prompt": "a" * (3 << 20)})
    assert response.status_code == 413
    declared = raw(server, "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
    assert declared.startswith(b"HTTP/1.1 413 ")


def test_large_heads_and_broken_http_get_400(server):
    assert raw(server, "GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + "y" * 40_000).startswith(b"HTTP/1.1 400 ")
    assert raw(server, "\x00\x01\x02\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    both = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: localhost\r\n\r\n"
    assert raw(server, "POST /v1/completions HTTP/1.1\r\n" + both, b"0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    bad_chunk = "Transfer-Encoding: chunked\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    raw(server, "POST /v1/completions HTTP/1.1\r\n" + bad_chunk, b"zz\r\nhello")
    assert httpx.get(server.url + "/health").status_code == 200


def test_many_tiny_chunks(server):
    body = b"".join(b"1\r\n%c\r\n" % c for c in json.dumps({"prompt": "a" * 20_000, "max_tokens": 1}).encode())
    head = "Transfer-Encoding: chunked\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = raw(server, "POST /v1/completions HTTP/1.1\r\n" + head, body + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"room for 4096" in answer


def test_slow_bodies_end(server, monkeypatch):
    monkeypatch.setattr("meshwright.serve.protocols.http.BODY_SECONDS", 0.2)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    assert raw(server, head, b'{"prompt').startswith(b"HTTP/1.1 408 ")


def test_slow_heads_end(server, monkeypatch):
    monkeypatch.setattr("meshwright.serve.protocols.protocol.HEAD_SECONDS", 0.2)
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_twenty_at_once(server):
    def ask(index: int) -> str:
        text = f"<{index}>"
        body = {"prompt": text, "max_tokens": 40, "stream": index % 2 == 0}
        response = post(server, "/v1/completions", body)
        if body["stream"]:
            return "".join(event["choices"][0]["text"] for event in events(response.content)[:-1])
        return str(response.json()["choices"][0]["text"])

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert answers == [(f"<{index}>" * 40)[:40] for index in range(20)]


def test_slow_readers_get_everything(server):
    body = json.dumps({"prompt": "abcd", "max_tokens": 3000, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + body)
        fast = post(server, "/v1/completions", {"prompt": "xy", "max_tokens": 4}).json()
        assert fast["choices"][0]["text"] == "xyxy"  # others do not wait for it
        received = b""
        while part := connection.recv(1024):
            received += part
    assert received.count(b'"text":"') == 3000
    assert b"data: [DONE]" in received


def metric(server, name: str) -> float:
    for line in httpx.get(server.url + "/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_slot(start, echo, until, stream):
    engine = echo(step_seconds=0.005, max_len=1 << 20)
    server = start(engine)
    body = json.dumps({"prompt": "ab", "max_tokens": 1_000_000, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + body)
        until(lambda: metric(server, "meshwright_engine_active") == 2)
    until(lambda: metric(server, "meshwright_engine_active") == 0)
    assert engine.requests == {}
    assert metric(server, "meshwright_cancelled_choices_total") == 2
    assert metric(server, "meshwright_open_choices") == 0


def test_client_that_stops_reading_is_cut_off(start, echo, until, monkeypatch):
    monkeypatch.setattr("meshwright.serve.protocols.protocol.STALLED_WRITE_SECONDS", 0.3)
    engine = echo(max_len=1 << 22)
    server = start(engine)
    body = json.dumps({"prompt": "ab", "max_tokens": 4_000_000, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + body)
        until(lambda: len(engine.submitted) == 1)
        until(lambda: engine.requests == {}, seconds=60)
        assert server.model.open_choices == 0


def test_full_queue_gets_429_and_recovers(start, echo, until):
    engine = echo(step_seconds=0.005, max_batch=1, max_len=1 << 20)
    server = start(engine)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        long = [pool.submit(post, server, "/v1/completions", {"prompt": "a", "max_tokens": 60}) for _ in range(9)]
        until(lambda: server.model.open_choices == 9)
        refused = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        assert httpx.get(server.url + "/health").status_code == 200
        for answer in long:
            assert answer.result().status_code == 200
    assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_failed_step_ends_its_requests_and_nothing_else(start, echo):
    engine = echo(fail_next_steps=1)
    server = start(engine)
    failed = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 5})
    assert failed.status_code == 500
    assert "0x" not in failed.text and "/secret" not in failed.text and "Traceback" not in failed.text
    assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 5}).status_code == 200


def test_numbers_that_are_not_finite_are_an_error_and_no_text(server, until):
    whole = post(server, "/v1/completions", {"prompt": "ab\x05", "max_tokens": 5})
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "not_finite" and "NaN" in whole.json()["error"]["message"]
    stream = post(server, "/v1/completions", {"prompt": ["ab\x05", "cdefgh"], "max_tokens": 50, "stream": True})
    payloads = [block.removeprefix(b"data: ") for block in stream.content.split(b"\n\n") if block]
    assert json.loads(payloads[-1])["error"]["code"] == "not_finite"
    until(lambda: server.engine.requests == {})
    assert post(server, "/v1/completions", {"prompt": "ab", "max_tokens": 3}).json()["choices"][0]["text"] == "aba"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_broken_engine_is_told_to_everyone(start, echo, until):
    engine = echo(step_seconds=0.2)
    server = start(engine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            engine.fail_next_steps = 1
            pool.submit(post, server, "/v1/completions", {"prompt": "a", "max_tokens": 5}).result()
    until(lambda: not server.model.healthy)
    assert httpx.get(server.url + "/health").status_code == 503
    assert post(server, "/v1/completions", {"prompt": "a"}).status_code == 503
