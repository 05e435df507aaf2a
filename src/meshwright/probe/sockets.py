"""Every socket that Meshwright opens: its purpose, its address, and the credentials that it asks for."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

from meshwright.errors import Problem
from meshwright.job.sections import LaunchSection, ServeSection
from meshwright.launch.network import interface_address, interface_problem, is_public


@dataclass(frozen=True)
class Listener:
    """A row of the table of `doctor`.

    `authenticated` names the credentials that a client must show, "" for none. `state` is "free", "in use", or "" where
    it is not known.
    """

    what: str
    opened_by: str
    address: str
    port: str
    authenticated: str
    state: str
    note: str


def listeners(serve: ServeSection, launch: LaunchSection) -> tuple[Listener, ...]:
    """All sockets of a job with these sections."""
    token = f"bearer token of {serve.token_file}" if serve.token_file else ""
    ranks_at = f"{launch.interface} ({interface_address(launch.interface) or 'no address'})"
    if launch.on != "local" and launch.interface == "lo":
        ranks_at = "each node's interface towards the hub"
    return (
        Listener(
            "HTTP: completions, chat, health, metrics",
            "serve",
            serve.host,
            _port(serve.http_port),
            token,
            _state(serve.host, serve.http_port),
            "not encrypted: put a TLS proxy before it beyond this machine",
        ),
        Listener(
            "gRPC: inference",
            "serve",
            serve.host,
            _port(serve.grpc_port),
            token,
            _state(serve.host, serve.grpc_port),
            "not encrypted: put a TLS proxy before it beyond this machine",
        ),
        Listener(
            "gloo or NCCL: tensors between the processes of a job",
            "train, verify, serve with tp > 1",
            ranks_at,
            "any free",
            "",
            "",
            "unauthenticated by design of gloo and NCCL; open while the job runs; keep the interface private",
        ),
        Listener(
            "hub: the processes of a job meet, and say how they are",
            "train, verify, serve; launch.on = local",
            "a Unix socket",
            "none",
            "the job's secret, and this user: folder of mode 0700 with a name that cannot be guessed",
            "",
            "read by `status` and `logs`, and by `stop`, with secrets of their own",
        ),
        Listener(
            "hub: agents of other machines attend it",
            "train; launch.on = ray or agents",
            launch.address or "set by launch.address",
            "of launch.address",
            "the job's secret; TLS with the job's own certificate",
            "",
            "the secrets are in files of mode 0600 in the run folder",
        ),
    )


def socket_problems(serve: ServeSection, launch: LaunchSection) -> list[Problem]:
    """The problems of the addresses of a job."""
    problems = []
    for key, port in (("serve.http_port", serve.http_port), ("serve.grpc_port", serve.grpc_port)):
        if _state(serve.host, port) == "in use":
            problems.append(Problem(key, f"port {port} of {serve.host} is in use", f"{key}=0 takes any free port"))
    if not _is_loopback(serve.host) and serve.token_file is None:
        what = f"{serve.host} is not loopback: anyone who reaches it may use the model"
        problems.append(Problem("serve.host", what, "set serve.token_file, or serve.host=127.0.0.1"))
    if problem := interface_problem(launch.interface):
        problems.append(problem)
    else:
        address = interface_address(launch.interface)
        if address and is_public(address):
            what = f"'{launch.interface}' has the public address {address}, and gloo and NCCL do not authenticate"
            problems.append(Problem("launch.interface", what, "use a private interface, or lo on one machine"))
    return problems


def _port(port: int) -> str:
    return str(port) if port else "any free"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _state(host: str, port: int) -> str:
    """Tries to listen on the port, and closes it at once."""
    if not port:
        return ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else f"cannot listen: {error.strerror}"
    return "free"
