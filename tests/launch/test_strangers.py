"""Strangers who reach the hub of a run: they cannot join, stall or read, and the run goes on undisturbed."""

from __future__ import annotations

import os
import random
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshwright import launch
from meshwright.errors import InputError
from meshwright.launch import RankGroup
from meshwright.launch.access import AGENTS, PEOPLE, READERS, read_dial
from meshwright.launch.attend import Agent
from meshwright.launch.groups import Node
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.messages import Dial, Message
from meshwright.launch.service import connect
from meshwright.launch.versions import own_versions
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubStub
from tests.launch.agents import AgentProcesses, eventually
from tests.launch.proxy import Proxy

NAME = wire.RankName(role="rank", rank=0)


def together(**told: Any) -> wire.ToldTogether:
    return wire.ToldTogether(told=[wire.Told(name=NAME, **told)])


METHODS = {
    "Attend": lambda stub, options: list(stub.Attend(iter([]), **options)),
    "Key": lambda stub, options: stub.Key(wire.KeyRequest(operation=wire.KeyRequest.COUNT), **options),
    "Tell": lambda stub, options: stub.Tell(together(kind="number", number=10**9), **options),
    "Calls": lambda stub, options: list(stub.Calls(wire.CallsRequest(name=NAME), **options)),
    "Answer": lambda stub, options: stub.Answer(wire.CallAnswer(name=NAME, id=1), **options),
    "Status": lambda stub, options: stub.Status(wire.StatusRequest(), **options),
    "Stop": lambda stub, options: stub.Stop(wire.StopRequest(), **options),
}


class Run:
    """A job at work whose rank tells numbers, and what a stranger knows of it."""

    def __init__(self, folder: Path) -> None:
        self.said: list[Message] = []
        self.proxies: list[Proxy] = []
        group = RankGroup("rank", "tests.launch.workers:tell_while_called", {}, 1)
        proxies = self.proxies

        class BehindAProxy(AgentProcesses):
            def open(self, files: HubFiles) -> None:
                self.access = folder / "hub" / AGENTS
                super().open(files)
                proxies.append(Proxy(self.hub_address))
                self.address = proxies[0].address

        self.cluster = BehindAProxy(folder, {"a": 1})
        self.launch = launch.start(
            self.cluster, [group], folder / "logs", hub_folder=folder / "hub", on_message=self.said.append
        )
        self.join, self.act, self.read = (read_dial(folder / "hub" / name) for name in (AGENTS, PEOPLE, READERS))
        host, _, port = self.join.address.rpartition(":")
        self.address = (host, int(port))

    def goes_on(self) -> None:
        """That the rank's words arrive while strangers do what they do, without a word missing."""
        heard = len(self.said)
        assert eventually(lambda: len(self.said) > heard + 20, 20)
        assert [one.body for one in list(self.said)] == list(range(1, len(self.said) + 1))
        assert self.launch.hub.generation == 1 and [node.name for node in self.launch.hub.nodes()] == ["a"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    found = Run(tmp_path_factory.mktemp("run"))
    with found.launch as started:
        yield found
        started.call("rank", 0, "return")
        (count,) = started.wait(30)
    assert [one.body for one in found.said] == list(range(1, count + 1))


@pytest.fixture(autouse=True)
def _undisturbed(run: Run, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    run.goes_on()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def answer(dial: Dial, method: str, secret: Any = None, generation: Any = "1") -> grpc.StatusCode:
    """What the hub says to a call: OK, or its refusal."""
    metadata = [("generation", generation)] if generation is not None else []
    secrets = [secret] if isinstance(secret, str) else secret or []
    metadata += [("secret", one) for one in secrets]
    channel = connect(dial.address, dial.certificate)
    try:
        METHODS[method](HubStub(channel), {"metadata": metadata, "timeout": 10})
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    finally:
        channel.close()
    return grpc.StatusCode.OK


def test_random_bytes_say_nothing(run: Run) -> None:
    drawn = random.Random(0)
    for size in (0, 1, 5, 100, 10_000, 1 << 20):
        for start in (b"", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(run.address, 10) as stranger:
                try:
                    stranger.sendall(start + drawn.randbytes(size))
                    stranger.shutdown(socket.SHUT_WR)
                    said = b""
                    while data := stranger.recv(1 << 16):
                        said += data
                except OSError:  # it was closed
                    continue
                assert run.join.secret.encode() not in said


def test_random_bytes_behind_the_encryption(run: Run) -> None:
    """Anyone may encrypt; what is spoken inside is refused as well."""
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    anyone.set_alpn_protocols(["h2"])
    drawn = random.Random(1)
    for start in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])):
        with anyone.wrap_socket(socket.create_connection(run.address, 10)) as stranger:
            try:
                stranger.sendall(start + drawn.randbytes(5000))
                while stranger.recv(1 << 16):
                    pass
            except OSError:  # it was closed
                continue


def test_hundreds_of_half_open_connections_stall_nobody(run: Run) -> None:
    strangers = [socket.create_connection(run.address, 10) for _ in range(300)]
    try:
        for stranger in strangers[::2]:
            stranger.sendall(b"\x16\x03\x01\x02\x00")  # the begin of a hello of TLS
        run.goes_on()
        assert answer(run.read, "Status", run.read.secret) == grpc.StatusCode.OK
    finally:
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize("method", METHODS)
def test_no_method_opens_without_its_secret(run: Run, method: str) -> None:
    refused = grpc.StatusCode.UNAUTHENTICATED
    of_scope = {"Status": run.read.secret, "Stop": run.act.secret}.get(method, run.join.secret)
    others = {run.join.secret, run.read.secret, run.act.secret} - {of_scope}
    if method == "Status":
        others.remove(run.act.secret)  # who may act may look
    for secret in (None, "", "x", of_scope[:-1], of_scope + "0", of_scope.upper(), *others):
        assert answer(run.join, method, secret) == refused, secret
    for secrets in ([of_scope, of_scope], ["x", of_scope]):
        assert answer(run.join, method, secrets) == refused


def test_methods_that_are_not_there_are_refused_alike(run: Run) -> None:
    channel = connect(run.join.address, run.join.certificate)
    for name in ("/meshwright.launch.Hub/Nothing", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary(name)(b"", timeout=10, metadata=[("secret", run.join.secret)])
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
    channel.close()


def test_who_is_not_given_the_certificate_reaches_no_hub_and_no_hub_but_the_own_is_believed(run: Run) -> None:
    from meshwright.launch.access import new_access

    other = new_access(network=True).certificate
    assert answer(replace(run.join, certificate=other), "Status", run.read.secret) == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("generation", ["0", "2", "-1", "", "x", None, "1 "])
def test_another_generation_can_neither_meet_nor_tell(run: Run, generation: str | None) -> None:
    for method in ("Key", "Tell", "Calls", "Answer"):
        code = answer(run.join, method, run.join.secret, generation)
        assert code == grpc.StatusCode.FAILED_PRECONDITION, method


def attend(run: Run, **fields: Any) -> list[wire.HubMessage]:
    """What the hub says to a hello with the right secret, up to its first word that is no beat."""
    versions = own_versions()
    hello = wire.Hello(
        node=wire.Node(name="a", devices=1),
        code_digest=versions.code_digest,
        torch_version=versions.torch,
        python_version=versions.python,
    )
    for name, value in fields.items():
        hello.ClearField(name)
        hello.MergeFrom(wire.Hello(**{name: value}))
    channel = connect(run.join.address, run.join.certificate)
    try:
        metadata = [("secret", run.join.secret)]
        return list(HubStub(channel).Attend(iter([wire.AgentMessage(hello=hello)]), metadata=metadata, timeout=10))
    finally:
        channel.close()


def test_a_hello_for_a_node_that_attends_is_refused(run: Run) -> None:
    ticket = run.launch.hub.tickets()["a"]
    for tried in ("", "x", ticket):  # the last is a hello that was replayed
        (said,) = attend(run, ticket=tried)
        assert said.refused == "node a: an agent of that name attends already"


def test_a_hello_of_a_generation_that_is_over_is_given_up(run: Run) -> None:
    (said,) = attend(run, node=wire.Node(name="b", devices=1), ticket="t", generation=7)
    assert said.given_up == "the ranks are of generation 7, which is over"


def test_what_begins_without_a_hello_is_no_agent(run: Run) -> None:
    channel = connect(run.join.address, run.join.certificate)
    for first in ([], [wire.AgentMessage(beat=wire.Beat())]):
        assert list(HubStub(channel).Attend(iter(first), metadata=[("secret", run.join.secret)], timeout=10)) == []
    channel.close()


def test_a_message_that_is_too_large_is_refused(run: Run) -> None:
    options = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "meshwright-hub")]
    credentials = grpc.ssl_channel_credentials(run.join.certificate.encode())
    channel = grpc.secure_channel(run.join.address, credentials, options)
    metadata = [("secret", run.join.secret), ("generation", "1")]
    with pytest.raises(grpc.RpcError) as raised:
        HubStub(channel).Tell(together(kind="x", blob=bytes(65 << 20)), metadata=metadata, timeout=30)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    channel.close()


def test_words_that_are_no_json_are_refused(run: Run) -> None:
    channel = connect(run.join.address, run.join.certificate)
    metadata = [("secret", run.join.secret), ("generation", "1")]
    for call, request in (
        (HubStub(channel).Tell, together(kind="x", body=b"{", number=10**9)),
        (HubStub(channel).Answer, wire.CallAnswer(name=NAME, id=1, body=b"\xff")),
        (HubStub(channel).Key, wire.KeyRequest(operation=wire.KeyRequest.GET, id=1)),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call(request, metadata=metadata, timeout=10)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    channel.close()


def test_a_ticket_that_was_given_up_opens_nothing(tmp_path: Path) -> None:
    """As that of a host which was cut off, and whose hello somebody has kept."""
    cluster = AgentProcesses(tmp_path, {"a": 1})
    group = RankGroup("rank", "tests.launch.workers:until_asked", {"folder": str(tmp_path)}, 1)
    with launch.start(cluster, [group], tmp_path / "logs") as started:
        hub, dial = started.hub, started._files.network
        assert dial is not None
        agent = Agent(dial, Node("b"), own_versions())
        with hub._lock:
            hub._lost_tickets.add(agent._ticket)
        outcome = agent.run()
        assert outcome.kind == "given up"
        assert "gave this node up" in outcome.words
        assert [node.name for node in hub.nodes()] == ["a"]


def test_the_files_of_a_hub_are_its_owners(run: Run, tmp_path: Path) -> None:
    folder = run.launch._files.folder
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes.pop("mark") & 0o022 == 0
    assert set(modes) == {"access.json", "agents.json", "people.json", "readers.json", "hub.json"}
    assert set(modes.values()) == {0o600}
    copy = tmp_path / "agents.json"
    copy.write_bytes((folder / "agents.json").read_bytes())
    os.chmod(copy, 0o640)
    with pytest.raises(InputError, match=r"others can read it \(mode 0640\)"):
        read_dial(copy)


def test_new_secrets_are_taken_and_the_old_ones_open_nothing(run: Run) -> None:
    """While the rank tells, adds to keys and listens for calls; the second time while its node is out of reach."""
    folder = run.launch._files.folder
    assert folder is not None
    before = {"Key": run.join.secret, "Status": run.read.secret, "Stop": run.act.secret}
    for out_of_reach in (False, True):
        if out_of_reach:
            run.proxies[0].cut()
        launch.rotate(folder.parent)
        old = before["Status"]
        assert eventually(lambda old=old: answer(run.join, "Status", old) == grpc.StatusCode.UNAUTHENTICATED, 10)
        assert eventually(lambda old=old: read_dial(folder / READERS).secret != old, 10)
        run.proxies[0].mend()
        for method, secret in before.items():
            assert answer(run.join, method, secret) == grpc.StatusCode.UNAUTHENTICATED
        names = {"Key": AGENTS, "Status": READERS, "Stop": PEOPLE}
        before = {method: read_dial(folder / name).secret for method, name in names.items()}
        for method in ("Key", "Status"):
            assert answer(run.join, method, before[method]) == grpc.StatusCode.OK
        call = run.launch.call("rank", 0, "give back", "still here")
        assert (run.launch.call_result(20).id, run.launch.hub.generation) == (call, 1)
        run.goes_on()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.name != "mark"} == {0o600}


def test_no_run_no_new_secrets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not at work"):
        launch.rotate(tmp_path)
