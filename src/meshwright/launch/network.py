"""The network interfaces of this machine, and which of them reaches a host."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
from pathlib import Path

from meshwright.errors import CannotWork, InputError, Problem

#: An address for documentation, which no host has: packets there leave by the default route.
FAR_HOST = "192.0.2.1"
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class NoRoute(InputError):
    """A host's name is unknown, or no route leads there: now, which may change."""


def host_and_port(address: str, example: str) -> tuple[str, int]:
    """The parts of `launch.address`. Raises InputError, with an example, where it is not HOST:PORT."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(Problem("launch.address", f"{address!r} is not HOST:PORT", f"such as {example}"))
    return host, int(port)


def interface_names() -> list[str]:
    """The network interfaces of this machine."""
    return [name for _, name in socket.if_nameindex()]


def interface_problem(name: str) -> Problem | None:
    """What is wrong if this machine has no network interface `name`."""
    names = interface_names()
    if name in names:
        return None
    return Problem("launch.interface", f"there is no network interface {name!r}", "known: " + ", ".join(names))


def interface_address(name: str) -> str | None:
    """The IPv4 address of a network interface, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = name.encode()[:15].ljust(256, b"\0")
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def outward_address() -> str:
    """An IPv4 address by which other hosts may reach this one: that of the interface of the default route, else of the
    first interface beside loopback. Raises CannotWork without one."""
    with contextlib.suppress(NoRoute):
        towards = _address_towards(FAR_HOST)
        if not ipaddress.ip_address(towards).is_loopback:
            return towards
    for name in interface_names():
        address = interface_address(name)
        if address is not None and not ipaddress.ip_address(address).is_loopback:
            return address
    raise CannotWork(Problem("launch.address", "this machine has no address that others reach", "name it: HOST:PORT"))


def interface_towards(host: str) -> str:
    """The interface that packets to `host` leave by. Raises NoRoute where the name or a route is unknown."""
    address = _address_towards(host)
    return next((name for name in interface_names() if interface_address(name) == address), "lo")


def _address_towards(host: str) -> str:
    """This machine's address in packets to `host`. Raises as `interface_towards`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # a datagram socket sends nothing here, it asks the routing table
        except OSError as error:
            raise NoRoute(Problem("launch.address", f"{host} cannot be reached: {error}")) from error
        return str(probe.getsockname()[0])


def link_bytes_per_second(name: str) -> float:
    """The speed that the interface's driver states, of one direction; 0 where it states none."""
    try:
        megabits = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return 0.0
    return max(0, megabits) * 1e6 / 8


def refuse_public(name: str) -> str:
    """The address of interface `name`. Raises CannotWork where it has none or a public one: gloo's and NCCL's data
    ports, which are opened there, do not authenticate."""
    address = interface_address(name)
    if address is None:
        names = ", ".join(interface_names())
        raise CannotWork(Problem("launch.interface", f"{name!r} has no IPv4 address", f"known: {names}"))
    if is_public(address):
        what = f"'{name}' has the public address {address}, and gloo and NCCL do not authenticate"
        raise CannotWork(Problem("launch.interface", what, "use a private interface (docs/security.md)"))
    return address


def is_public(address: str) -> bool:
    """Whether an address is reachable from anywhere."""
    return ipaddress.ip_address(address).is_global
