"""A run's progress arrives at a server that asks for a token and shows a certificate, as Kubeflow Trainer's does."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models import TrainerV1alpha1UpdateTrainJobStatusRequest

from meshwright import verbs
from meshwright.job import Job
from meshwright.report import progress
from meshwright.report.progress import StatusAddress, posted, status_of
from meshwright.run import RunFolder
from meshwright.verbs.launch import new_access

TOKEN = "a-projected-token"


class Server(http.server.ThreadingHTTPServer):
    """Takes posts with the token, as {"path", "body"}."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        access = new_access()  # a certificate that is its own authority
        (folder / "ca.crt").write_text(access.certificate)
        (folder / "key.pem").write_text(access.key)
        (folder / "token").write_text(TOKEN + "\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.taken: list[dict[str, Any]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if allowed:
            self.server.taken.append(json.loads(body))
        self.send_response(200 if allowed else 401)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address_of(server: Server, folder: Path) -> StatusAddress:
    url = f"https://meshwright-hub:{server.server_port}/apis/status"
    return StatusAddress(url, folder / "ca.crt", folder / "token")


@pytest.fixture(autouse=True)
def the_name_of_the_certificate_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host == "meshwright-hub" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def step(run: RunFolder, number: int) -> None:
    run.append_event("step", step=number, loss=2.5, tokens_per_second=1e5, step_seconds=0.5)


def test_the_newest_step_is_posted_while_the_run_goes_on_and_at_its_end(tmp_path: Path, server: Server) -> None:
    run = RunFolder(tmp_path / "run")
    step(run, 1)  # of an earlier start: it is not news
    with posted(run, 8, address_of(server, tmp_path)):
        step(run, 2)
        wait_for(lambda: len(server.taken) == 1)
        step(run, 3)
        step(run, 4)
    first, last = (one["trainerStatus"] for one in server.taken)
    assert (first["progressPercentage"], first["estimatedRemainingSeconds"]) == (25, 3)
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (50, 2)
    assert last["metrics"] == [{"name": "loss", "value": "2.5"}, {"name": "tokens_per_second", "value": "100000"}]


def test_posts_are_seconds_apart(tmp_path: Path, server: Server) -> None:
    run = RunFolder(tmp_path / "run")
    with posted(run, 100, address_of(server, tmp_path)):
        for number in range(1, 31):
            step(run, number)
        wait_for(lambda: len(server.taken) == 1)
    assert len(server.taken) == 2 and server.taken[-1]["trainerStatus"]["progressPercentage"] == 30


def test_trainer_would_take_it() -> None:
    body = status_of({"step": 7, "loss": None, "tokens_per_second": 3, "step_seconds": None}, 7)
    status = TrainerV1alpha1UpdateTrainJobStatusRequest.from_dict(body)
    assert status is not None and status.trainer_status is not None
    assert status.trainer_status.progress_percentage == 100
    assert [metric.name for metric in status.trainer_status.metrics or []] == ["tokens_per_second"]


@pytest.mark.parametrize("what", ["wrong token", "another authority", "nobody there", "no token"])
def test_a_server_that_does_not_take_it_never_stops_the_run(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    address = address_of(server, tmp_path)
    if what == "wrong token":
        address.token.write_text("stolen")
    elif what == "another authority":
        address.authority.write_text(new_access().certificate)
    elif what == "nobody there":
        address = StatusAddress("https://127.0.0.1:9/", address.authority, address.token)
    else:
        address.token.unlink()
    run = RunFolder(tmp_path / "run")
    with caplog.at_level(logging.WARNING, "meshwright"), posted(run, 8, address):
        step(run, 2)
        step(run, 3)
    assert server.taken == []
    assert len(caplog.records) == 1 and "cannot be posted" in caplog.text


@pytest.mark.slow
def test_train_posts_its_progress_where_trainer_asks_for_it(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address_of(server, tmp_path)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", address.url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(address.authority))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(address.token))
    (tmp_path / "texts.txt").write_text("word " * 4000)
    model = {"family": "llama", "layers": 2, "hidden": 48, "heads": 6, "kv_heads": 2, "ffn": 96, "vocab": 300}
    data = {"source": str(tmp_path / "texts.txt"), "seq_len": 16, "tokenizer": "bytes"}
    train = {"steps": 3, "lr": 1e-3, "global_batch": 4}
    verbs.train(Job(model=model, data=data, train=train, cluster={"devices": 1}), run=tmp_path / "run")
    assert server.taken[-1]["trainerStatus"]["progressPercentage"] == 100


def test_without_an_address_nothing_runs(tmp_path: Path) -> None:
    before = threading.active_count()
    with posted(RunFolder(tmp_path), 1, None):
        assert threading.active_count() == before
