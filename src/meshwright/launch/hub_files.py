"""A hub with the files by which agents and people find it. See `access` for what those with secrets hold.

RUN/hub/hub.json    {pid, host, addresses, generation, groups, places, tickets, folder}: what a hub that is started
                    again needs to take over the ranks that live
RUN/hub/mark        by it an agent sees whether it shares this disk
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from meshwright.errors import InputError, Problem
from meshwright.launch.access import (
    ACCESS,
    AGENTS,
    HUB_FOLDER,
    PEOPLE,
    READERS,
    Access,
    new_access,
    read_access,
    read_private,
    write_private,
)
from meshwright.launch.groups import Need, Node, Place, RankGroup
from meshwright.launch.hub import Hub
from meshwright.launch.messages import Dial
from meshwright.launch.network import outward_address
from meshwright.launch.private_folder import private_folder
from meshwright.launch.run_files import RunFiles
from meshwright.launch.service import HubServer
from meshwright.launch.versions import own_versions

log = logging.getLogger("meshwright")

PREFIX = "meshwright-hub-"
#: The kernel's limit of a socket's path, less its end.
MAX_SOCKET_PATH_BYTES = 107
CHECK_SECONDS = 1.0
#: Hosts to listen on that stand for all addresses of this machine.
EVERY_ADDRESS = ("0.0.0.0", "[::]", "")
FACTS, MARK = "hub.json", "mark"


@dataclass(frozen=True)
class Before:
    """The generation that a hub which was killed had at work."""

    generation: int
    groups: tuple[RankGroup, ...]
    places: tuple[Place, ...]
    nodes: tuple[Node, ...]  # of the places
    tickets: Mapping[str, str]
    addresses: tuple[str, ...]  # that it listened on


class HubFiles:
    """`hub`, and how to reach it: `local` from this machine, `network` from others (None where it does not listen).
    `before`: what a hub that was killed has left in `folder`: its ranks are this hub's now."""

    def __init__(self, folder: Path | None, listen: Sequence[str], patience_seconds: float = 0.0) -> None:
        """folder: RUN/hub; None for a job that only its own processes need to find. listen: addresses of a network;
        patience_seconds: see Hub."""
        self._stack = ExitStack()
        self.folder = folder
        self.groups: Sequence[RankGroup] = ()
        self.places: Sequence[Place] = ()
        try:
            private = self._stack.enter_context(private_folder(PREFIX, _socket_root()))
            self._access = _access_of(folder, bool(listen))
            self.before = _before(folder, listen)
            mark = ("", "")
            if folder is not None:
                mark = (str((folder / MARK).resolve()), secrets.token_hex(16))
            server = self._serve(f"unix:{private / 'socket'}", listen, mark, patience_seconds)
            self._stack.callback(server.close)
            self._addresses = server.addresses
            self.local = Dial(server.addresses[0], self._access.join)
            self.network: Dial | None = None
            if listen:
                host, _, port = server.addresses[1].rpartition(":")
                address = f"{outward_address() if host in EVERY_ADDRESS else host}:{port}"
                self.network = Dial(address, self._access.join, self._access.certificate)
            if folder is not None:
                self._publish(folder, mark[1])
        except BaseException:
            self._stack.close()
            raise

    def begin(self, generation: int, groups: Sequence[RankGroup], places: Sequence[Place], folder: Path) -> None:
        """Starts a generation (see Hub.begin), and writes down what a hub that is started again needs."""
        self.groups, self.places = groups, places
        self.hub.begin(generation, groups, places, str(folder.absolute()))
        self._write_facts()

    def _serve(
        self, socket_path: str, listen: Sequence[str], mark: tuple[str, str], patience_seconds: float
    ) -> HubServer:
        """Serves a new hub: at the addresses of the one before, where its agents look for it, or where these cannot be
        had any more as a hub that knows nothing of it."""
        self.hub = Hub(self._access, own_versions(), mark, patience_seconds)
        files = RunFiles(None if self.folder is None else self.folder.parent)
        if self.before is not None:
            # Before anybody reaches it: what it does not know of it would refuse.
            self.hub.adopt(self.before.generation, self.before.places, self.before.nodes, self.before.tickets)
            try:
                server = HubServer(self.hub, [socket_path, *self.before.addresses], files)
            except InputError as error:
                log.warning("the ranks of the driver before cannot be taken over: %s", error)
                self.hub.end()
                self.before = None
                return self._serve(socket_path, listen, mark, patience_seconds)
            self.groups, self.places = self.before.groups, self.before.places
            return server
        return HubServer(self.hub, [socket_path, *listen], files)

    def _publish(self, folder: Path, mark: str) -> None:
        write_private(folder / ACCESS, asdict(self._access))
        (folder / MARK).write_text(mark)
        self._write_facts()
        self._write_dials()
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(folder, over), name="meshwright-hub-secrets", daemon=True)
        watch.start()

        def withdraw() -> None:
            over.set()
            watch.join()
            for name in (AGENTS, PEOPLE, READERS, FACTS, MARK, ACCESS):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()

        self._stack.callback(withdraw)

    def _write_dials(self) -> None:
        assert self.folder is not None
        dial = self.network or self.local
        for name, secret in (
            (AGENTS, self._access.join),
            (PEOPLE, self._access.act),
            (READERS, self._access.read),
        ):
            record = {"address": dial.address, "secret": secret, "certificate": dial.certificate}
            if name != AGENTS:
                record["socket"] = self.local.address.removeprefix("unix:")
            write_private(self.folder / name, record)

    def _write_facts(self) -> None:
        if self.folder is not None:
            facts = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "addresses": list(self._addresses),
                "generation": self.hub.generation,
                "groups": [asdict(group) for group in self.groups],
                "places": [asdict(place) for place in self.places],
                "nodes": [asdict(node) for node in self.hub.nodes()],
                "tickets": self.hub.tickets(),
            }
            write_private(self.folder / FACTS, facts)

    def _watch(self, folder: Path, over: threading.Event) -> None:
        """Takes new secrets when a person has written them (`rotate`)."""
        told = ""
        while not over.wait(CHECK_SECONDS):
            try:
                access = read_access(folder / ACCESS)
                if access != self._access:
                    self._access = access
                    self.hub.renew(access)
                    self._write_dials()
            except OSError:
                continue  # the folder is on a disk that may be away for a moment
            except InputError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("the secrets stay as they are: %s", error)

    def close(self) -> None:
        """Tells the agents that the job is over, and removes the files."""
        self._stack.close()


def rotate(run: Path | str) -> None:
    """Replaces the secrets of the run at work in folder `run`: its hub takes them within a second or two, tells the
    agents that attend, and writes the files anew. The old secrets open nothing from then on.

    Raises InputError where no run is at work there.
    """
    path = Path(run) / HUB_FOLDER / ACCESS
    if not path.exists():
        raise InputError(Problem(str(run), "is not at work", "see meshwright status"))
    write_private(path, asdict(read_access(path).rotated()))


def _access_of(folder: Path | None, network: bool) -> Access:
    """New secrets, or those that are in `folder` already: of a hub that was killed, or put there before the start."""
    if folder is not None and (folder / ACCESS).exists():
        access = read_access(folder / ACCESS)
        if access.certificate or not network:
            return access
    return new_access(network=network)


def _before(folder: Path | None, listen: Sequence[str]) -> Before | None:
    """What a killed hub of a network has left, if it had ranks at work."""
    if folder is None or not listen or not (folder / FACTS).exists():
        return None
    facts = read_private(folder / FACTS)
    if not facts["places"] or len(facts["addresses"]) < 2:
        return None
    groups = tuple(
        RankGroup(**{**group, "need": Need(**group["need"]), "nodes": tuple(group["nodes"])})
        for group in facts["groups"]
    )
    places = tuple(Place(**place) for place in facts["places"])
    used = {place.node for place in places}
    nodes = tuple(Node(**node) for node in facts["nodes"] if node["name"] in used)
    return Before(facts["generation"], groups, places, nodes, facts["tickets"], tuple(facts["addresses"][1:]))


def _socket_root() -> Path:
    """Where the folder of the hub's socket goes: a socket's path may not be long."""
    root = Path(tempfile.gettempdir())
    long = len(os.fsencode(root / f"{PREFIX}12345678/socket")) > MAX_SOCKET_PATH_BYTES
    return Path("/tmp") if long else root
