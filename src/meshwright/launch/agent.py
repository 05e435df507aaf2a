"""The agent of a node, as a program of its own.

    python -m meshwright.launch.agent --run RUN                          the run folder is on a disk that nodes share
    python -m meshwright.launch.agent --access FILE [--hub HOST:PORT]    it is not

Where the hub is silent for longer than its patience, the agent ends its ranks, and looks for a hub again.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.cluster import available_cores, memory_bytes, this_machine
from meshwright.errors import InputError, MeshwrightError, Problem
from meshwright.launch.access import AGENTS, HUB_FOLDER, read_dial
from meshwright.launch.attend import PATIENCE_SECONDS, RETRY_SECONDS, Agent, Outcome
from meshwright.launch.groups import Node
from meshwright.launch.messages import Dial
from meshwright.launch.network import NoRoute, interface_towards, link_bytes_per_second, refuse_public
from meshwright.launch.versions import own_versions

WAIT_SECONDS = 300.0


def attend(
    find: Callable[[], Dial | None],
    node: Callable[[Dial], Node],
    say: Callable[[str], None],
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    wait_seconds: float = WAIT_SECONDS,
    leaving: Leaving,
) -> Outcome:
    """Attends the hub that `find` finds, as the node that `node` describes, until its job is over.

    Ranks end when the hub has been silent for `patience_seconds`; the agent itself looks for a hub for `wait_seconds`
    more, and then attends as a new one: nothing of its old ranks is left. When `leaving` is called it ends.
    """
    until, outcome = time.monotonic() + wait_seconds, Outcome("lost", "no hub was found")
    while time.monotonic() < until:
        if leaving.called:
            return Outcome("left")
        dial = find()
        try:
            here = None if dial is None else node(dial)
        except NoRoute as error:  # yet: names and routes come as clusters start
            here, outcome = None, Outcome("lost", str(error))
        if dial is None or here is None:
            time.sleep(RETRY_SECONDS)
            continue
        agent = Agent(
            dial,
            here,
            own_versions(),
            patience_seconds=patience_seconds,
            find=find,
            reach_seconds=min(patience_seconds, until - time.monotonic()),
        )
        leaving.concerns(agent)
        outcome = agent.run()
        if outcome.kind not in ("lost", "given up"):
            return outcome
        if agent.attended:
            until = time.monotonic() + wait_seconds
            say(f"{outcome.words}: its ranks were ended, it looks for the hub for {wait_seconds:g} s")
        time.sleep(RETRY_SECONDS)
    return outcome


class Leaving:
    """Called when the node ends, as by a signal: tells the agent at work that `seconds` are left."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._agent: Agent | None = None
        self.called = False

    def concerns(self, agent: Agent) -> None:
        """From now on `agent` is the one at work."""
        self._agent = agent
        if self.called:
            agent.leave(self._seconds)

    def __call__(self, *_: object) -> None:
        if self._agent is not None and not self.called:
            self._agent.leave(self._seconds)
        self.called = True


def describe_node(dial: Dial, name: str | None, devices: int | None, interface: str | None) -> Node:
    """This machine as a node: its devices, its memory, and the interface by which it reaches the hub, or `interface`.

    Raises CannotWork where that interface has a public address, NoRoute where the hub's name is unknown or no route
    leads there.
    """
    chosen = interface or interface_towards(dial.address.rpartition(":")[0].strip("[]"))
    cluster = this_machine()
    count = cluster.devices if devices is None else devices
    link = link_bytes_per_second(chosen)
    kind, memory = cluster.device.kind, memory_bytes()
    address = refuse_public(chosen)
    return Node(name or socket.gethostname(), address, chosen, kind, count, available_cores(), memory, link)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m meshwright.launch.agent", description="The agent of one node.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", metavar="RUN", type=Path, help="run folder, on a disk that the driver shares")
    where.add_argument("--access", metavar="FILE", type=Path, help="the driver's RUN/hub/agents.json, copied here")
    parser.add_argument("--hub", metavar="HOST:PORT", help="address of the hub (default: that of the file)")
    parser.add_argument("--node", metavar="NAME", help="name of this node (default: its host name)")
    parser.add_argument("--devices", metavar="N", type=int, help="devices that ranks may use (default: all)")
    parser.add_argument("--interface", metavar="NAME", help="interface that ranks talk over (default: the hub's way)")
    what = f"how long ranks go on while the hub is silent (default: {PATIENCE_SECONDS:g})"
    parser.add_argument("--patience", metavar="S", type=float, default=PATIENCE_SECONDS, help=what)
    what = f"how long to look for a hub (default: {WAIT_SECONDS:g})"
    parser.add_argument("--wait", metavar="S", type=float, default=WAIT_SECONDS, help=what)
    what = "how long the node lasts after SIGTERM: ranks save meanwhile (default: 30)"
    parser.add_argument("--grace", metavar="S", type=float, default=30.0, help=what)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Attends until the job is over (0), the hub refuses this node (3), or none is found (4); 2 is bad input."""
    options = _parser().parse_args(arguments)
    path = options.access or options.run / HUB_FOLDER / AGENTS

    def find() -> Dial | None:
        try:
            dial = read_dial(path)
        except OSError as error:
            if options.run is not None and not isinstance(
                error, PermissionError
            ):  # the driver has not written it yet, or has ended
                return None
            raise InputError(
                Problem(str(path), f"cannot be read: {error.strerror}", "agents.json of the driver")
            ) from error
        return replace(dial, address=options.hub) if options.hub else dial

    leaving = Leaving(options.grace)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leaving)
    try:
        outcome = attend(
            find,
            lambda dial: describe_node(dial, options.node, options.devices, options.interface),
            lambda words: print(f"meshwright agent: {words}", file=sys.stderr, flush=True),
            patience_seconds=options.patience,
            wait_seconds=options.wait,
            leaving=leaving,
        )
    except MeshwrightError as error:
        print(f"meshwright agent: {error}", file=sys.stderr)
        return error.exit_code
    if outcome.words:
        print(f"meshwright agent: {outcome.words}", file=sys.stderr)
    return {"done": 0, "left": 0, "refused": 3}.get(outcome.kind, 4)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit: a thread of gRPC that outlives the interpreter would hold its end up
