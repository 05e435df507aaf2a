"""The hub's service: the methods of the wire, the guard before them, and the channel that reaches them."""

from __future__ import annotations

import contextlib
import queue
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from meshwright.errors import InputError, Problem
from meshwright.launch.access import CERTIFICATE_NAME, Access
from meshwright.launch.hub import BEAT_SECONDS, Hub, Member
from meshwright.launch.run_files import Refused, RunFiles
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubServicer, add_HubServicer_to_server

T = TypeVar("T")

#: For the last words to agents to leave.
CLOSE_SECONDS = 1.0
MAX_MESSAGE_BYTES = 64 << 20
#: A thread waits for each agent and for each rank that listens for calls; idle ones cost their stack's first page.
MAX_THREADS = 4096
#: Method -> the scope whose secret it needs.
SCOPE_OF: Mapping[str, str] = {
    **dict.fromkeys(("Attend", "Key", "Tell", "Calls", "Answer", "Read", "Write"), "join"),
    "Status": "read",
    "Stop": "act",
}
#: For channel and server.
OPTIONS = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES))
#: A call that waits on a connection which nobody closed, as after a cut cable, is noticed by gRPC's pings: TCP itself
#: would try for a quarter of an hour.
KEEPALIVE = (("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000))
#: Connections that say nothing are closed: a stranger's half-open ones after the first, a rank's, which are made again
#: when it calls, after the second.
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # a client may ping as often as KEEPALIVE says
)


class HubServer:
    """Lets others reach `hub` at `listen`, gRPC's addresses; those of a network ("HOST:PORT") are encrypted with the
    certificate of the hub's access. Raises InputError where it cannot listen there."""

    def __init__(self, hub: Hub, listen: Sequence[str], files: RunFiles) -> None:
        self._hub = hub
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="meshwright-hub"),
            interceptors=[_Guard(lambda: hub.access)],
            options=[*OPTIONS, *SERVER_OPTIONS],
        )
        add_HubServicer_to_server(_Service(hub, files), self._server)
        if any(not address.startswith("unix:") for address in listen):
            _allow_more_files()
        #: The addresses, with the ports that were free.
        self.addresses: tuple[str, ...] = tuple(self._listen(address) for address in listen)
        self._server.start()

    def _listen(self, address: str) -> str:
        access = self._hub.access
        try:
            if address.startswith("unix:"):
                self._server.add_insecure_port(address)
                return address
            credentials = grpc.ssl_server_credentials([(access.key.encode(), access.certificate.encode())])
            port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            near = "a free port of an address of this machine; port 0 takes any"
            raise InputError(Problem("launch.address", f"the hub cannot listen on {address}", near)) from error
        return f"{address.rpartition(':')[0]}:{port}"

    def close(self) -> None:
        """Tells all agents that the job is over, and ends."""
        self._hub.end()
        self._server.stop(grace=CLOSE_SECONDS).wait()


class _Service(HubServicer):
    """The methods of the wire, each a few lines over the hub."""

    def __init__(self, hub: Hub, files: RunFiles) -> None:
        self._hub, self._files = hub, files

    def Attend(self, requests: Iterator[wire.AgentMessage], context: Any) -> Iterator[wire.HubMessage]:
        first = next(requests, None)
        if first is None or first.WhichOneof("what") != "hello":
            return
        admitted = self._hub.admit(first.hello)
        if isinstance(admitted, wire.HubMessage):
            yield admitted
            return
        member, connection, outbox = admitted
        context.add_callback(lambda: self._hub.leave(member, connection))
        reader = threading.Thread(target=self._listen, args=(member, requests), name="meshwright-hub-hear", daemon=True)
        reader.start()
        yield wire.HubMessage(welcome=self._hub.welcome)
        while context.is_active() and member.connection == connection:
            try:
                message = outbox.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                message = wire.HubMessage(beat=wire.Beat())
            if message is None:
                return
            yield message

    def _listen(self, member: Member, requests: Iterator[wire.AgentMessage]) -> None:
        with contextlib.suppress(grpc.RpcError):  # the connection ended, which the call's callback says
            for message in requests:
                self._hub.hear(member, message)

    def Key(self, request: wire.KeyRequest, context: Any) -> wire.KeyReply:
        generation = self._require_current(context)
        while True:
            try:
                reply = self._hub.key(request, generation)
            except ValueError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            if reply is not None:
                return reply
            self._require_current(context)  # another generation has begun: this ends the call

    def Tell(self, request: wire.ToldTogether, context: Any) -> wire.Received:
        for told in request.told:
            self._take(self._hub.told, told, context)
        return wire.Received()

    def Calls(self, request: wire.CallsRequest, context: Any) -> Iterator[wire.Call]:
        self._require_current(context)
        calls = self._hub.calls_of(request.name, request.after)
        while calls is not None and context.is_active():
            with contextlib.suppress(queue.Empty):
                if (call := calls.get(timeout=BEAT_SECONDS)) is None:
                    return
                yield call

    def Answer(self, request: wire.CallAnswer, context: Any) -> wire.Received:
        return self._take(self._hub.answered, request, context)

    def _take(self, take: Callable[[Any], None], request: Any, context: Any) -> wire.Received:
        self._require_current(context)
        try:
            take(request)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not JSON: {error}")
        return wire.Received()

    def Read(self, request: wire.ReadRequest, context: Any) -> wire.ReadReply:
        self._require_current(context)
        return self._unless_refused(lambda: self._files.read(request), context)

    def Write(self, request: wire.WriteRequest, context: Any) -> wire.WriteReply:
        generation = self._require_current(context)
        return self._unless_refused(lambda: self._files.write(request, generation), context)

    def _unless_refused(self, act: Callable[[], T], context: Any) -> T:
        try:
            return act()
        except Refused as refused:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(refused))
            raise

    def Status(self, request: wire.StatusRequest, context: Any) -> wire.StatusReply:
        return self._hub.status()

    def Stop(self, request: wire.StopRequest, context: Any) -> wire.Received:
        self._hub.ask_stop(by_person=True)
        return wire.Received()

    def _require_current(self, context: Any) -> int:
        metadata = dict(context.invocation_metadata())
        if refused := self._hub.current(metadata):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refused)
        return int(metadata["generation"])


class _Guard(grpc.ServerInterceptor):
    """Refuses calls without the secret of their scope, before any of their content is read."""

    def __init__(self, access: Callable[[], Access]) -> None:
        self._access = access

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        scope = SCOPE_OF.get(details.method.rpartition("/")[2])
        secrets = [value for key, value in details.invocation_metadata if key == "secret"]
        if scope and len(secrets) == 1 and self._access().opens(scope, secrets[0]):
            return continuation(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)  # ends the call without waiting for its content


def _refuse(_: Any, context: Any) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the secret is missing, wrong, or of another scope")


def _allow_more_files() -> None:
    """As many open files as this process may ask for: connections of strangers, each for as long as it may say nothing,
    must not use up those that the driver itself needs."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def connect(address: str, certificate: str) -> grpc.Channel:
    """A channel to a hub. Over a network it is encrypted, and only the owner of `certificate` is taken for the hub."""
    options = [
        *OPTIONS,
        *KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if address.startswith("unix:"):
        return grpc.insecure_channel(address, [*options, ("grpc.default_authority", CERTIFICATE_NAME)])
    credentials = grpc.ssl_channel_credentials(certificate.encode())
    return grpc.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", CERTIFICATE_NAME)])
