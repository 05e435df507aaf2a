"""What a person may ask of a hub from another terminal, by the files in its run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from meshwright.errors import InputError, Problem, RunFailed
from meshwright.launch.access import PEOPLE, READERS, read_dial, read_private
from meshwright.launch.groups import Node
from meshwright.launch.service import connect
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubStub
from meshwright.launch.wire_forms import node_of

ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class HubStatus:
    """What a hub says of its job: `ranks` are {role, rank, node, state}, `failures` texts, `seconds` since it began."""

    generation: int
    nodes: tuple[Node, ...]
    ranks: tuple[dict[str, Any], ...]
    failures: tuple[str, ...]
    seconds: float


def hub_status(folder: Path) -> HubStatus | None:
    """The status of the hub whose files are in `folder`; None where there is none. Needs the secret of scope read.

    Raises RunFailed where the hub does not answer, InputError where it refuses the secret.
    """
    reply = _ask(folder, READERS, lambda stub, options: stub.Status(wire.StatusRequest(), **options))
    if reply is None:
        return None
    ranks = tuple(
        {"role": rank.name.role, "rank": rank.name.rank, "node": rank.node, "state": rank.state} for rank in reply.ranks
    )
    nodes = tuple(node_of(node) for node in reply.nodes)
    return HubStatus(reply.generation, nodes, ranks, tuple(reply.failures), reply.seconds)


def ask_to_stop(folder: Path) -> bool:
    """Has the hub whose files are in `folder` end its job, as SIGTERM would; False where there is none.

    Needs the secret of scope act. Raises as `hub_status`.
    """
    return _ask(folder, PEOPLE, lambda stub, options: stub.Stop(wire.StopRequest(), **options)) is not None


def _ask(folder: Path, name: str, call: Any) -> Any:
    path = folder / name
    try:
        if not path.exists():
            return None
        dial = read_dial(path)
        if (local := read_private(path).get("socket")) and Path(local).exists():  # of a driver on this machine
            dial = replace(dial, address=f"unix:{local}")
    except PermissionError as error:
        what = "may only be read by the user who started the run"
        raise InputError(Problem(str(path), what, "ask them for the file, or for a token")) from error
    channel = connect(dial.address, dial.certificate)
    try:
        return call(HubStub(channel), {"timeout": ANSWER_SECONDS, "metadata": [("secret", dial.secret)]})
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise InputError(Problem(str(path), f"the hub refuses its secret: {error.details()}")) from error
        what = f"the hub at {dial.address} does not answer: its driver was killed, or is on another machine"
        raise RunFailed(Problem(str(path), what)) from error
    finally:
        channel.close()
