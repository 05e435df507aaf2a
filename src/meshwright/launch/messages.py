"""What is said between a job's driver, its agents and its ranks, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.errors import CannotWork, InputError, LayoutsDisagree, MeshwrightError, Problem, RunFailed
from meshwright.launch.groups import Node, RankGroup

#: Errors of a rank that keep their class in the driver. Any other becomes RunFailed.
ERRORS: dict[str, type[MeshwrightError]] = {
    error.__name__: error for error in (MeshwrightError, InputError, CannotWork, RunFailed, LayoutsDisagree)
}

#: Kind of failure -> what it means.
FAILURES = {
    "exit": "ended with an exit code and left no result",
    "signal": "was killed by a signal",
    "memory": "was killed because the node ran out of memory",
    "error": "raised an exception",
    "refused": "raised an error of ours (bad input, cannot work), or its node was refused by the hub",
    "cannot-start": "could not be started",
    "stopped": "is held by SIGSTOP, or a debugger",
    "silent": "its node has not been heard of",
    "unreachable": "its node closed the connection and did not come back",
}

#: Words of errors that follow from the end of another rank.
CONSEQUENCES = (
    "connection reset by peer",
    "connection closed by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "application timeout caused pair closure",
    "remote process exited",
    "ncclremoteerror",
    "ncclinternalerror",
    "the hub is at generation",
)


@dataclass(frozen=True)
class Failure:
    """The end of a rank without a result. `message` says what happened, `error` is what the rank raised where that is
    of our tree, `seconds` is when, by the hub's clock."""

    role: str
    rank: int
    node: str
    generation: int
    kind: str
    message: str
    seconds: float
    log_tail: str = ""
    error: MeshwrightError | None = None

    @property
    def consequence(self) -> bool:
        """Whether this follows from the end of another rank, as far as its words say."""
        text = f"{self.message} {self.error or ''}".lower()
        return self.kind in ("error", "refused") and any(words in text for words in CONSEQUENCES)


def first(failures: list[Failure]) -> Failure:
    """The failure that the others follow from: no consequence; of these, one that the rank could not tell of itself
    (a signal, a silent node), else the earliest."""
    told = ("error", "refused", "exit")
    return min(failures, key=lambda failure: (failure.consequence, failure.kind in told, failure.seconds, failure.rank))


@dataclass(frozen=True)
class CallResult:
    """What rank `rank` of `role` answered to the call `id`; `error` in words where it failed."""

    id: int
    role: str
    rank: int
    body: Any
    blob: bytes
    error: str


@dataclass(frozen=True)
class Message:
    """What a rank told the driver; or its agent: "log", and "without-disk" where the node does not see the run folder's
    disk, once a generation, of its first rank there."""

    role: str
    rank: int
    kind: str
    body: Any
    blob: bytes


@dataclass(frozen=True)
class NodeJoined:
    node: Node


@dataclass(frozen=True)
class NodeLeaving:
    """The node ends in `node.leaving_seconds`: ranks there have been asked to save and end."""

    node: Node


@dataclass(frozen=True)
class NodeLost:
    """The node is no longer heard of: `kind` is silent or unreachable, `reason` says it in words."""

    node: Node
    kind: str
    reason: str


@dataclass(frozen=True)
class NodeRefused:
    """An agent that may not join, and why."""

    node: Node
    reason: str


@dataclass(frozen=True)
class Returned:
    """A rank has returned `result`, JSON."""

    role: str
    rank: int
    result: Any


@dataclass(frozen=True)
class RankStopped:
    """A rank has ended without a result because it was asked to."""

    role: str
    rank: int


@dataclass(frozen=True)
class RanksBegun:
    """All ranks of the generation that are placed on `node` run."""

    node: str


@dataclass(frozen=True)
class StopAsked:
    """The job is to end: as after SIGTERM, it saves first. `by_person`: somebody with the scope to act asks for it,
    else the driver itself."""

    by_person: bool = False


Event = (
    NodeJoined
    | NodeLeaving
    | NodeLost
    | NodeRefused
    | RanksBegun
    | RankStopped
    | StopAsked
    | CallResult
    | Message
    | Returned
    | Failure
)


@dataclass(frozen=True)
class Finished:
    """All ranks have returned: `results`, group by group and by rank."""

    results: list[Any]


@dataclass(frozen=True)
class Wait:
    """No groups yet: ask again when nodes join or leave, with the event Waited after `seconds` in all."""

    seconds: float


@dataclass(frozen=True)
class Waited:
    """The time of a Wait is over."""


#: What happened (None at the start), and the nodes there are -> the groups wanted now. None: for Finished that the job
#: is done, for a failure that the caller gives up, for all else the same groups as before.
Ask = Callable[["Event | Finished | Waited | None", Sequence[Node]], Sequence[RankGroup] | Wait | None]


@dataclass(frozen=True)
class Dial:
    """How the hub is reached: gRPC's address ("unix:PATH", "10.0.0.1:7474"), the secret of the scope that the holder
    has, and over a network the hub's certificate (PEM)."""

    address: str
    secret: str
    certificate: str = ""


@dataclass(frozen=True)
class RankPlace:
    """A rank's place among the ranks of its role, as its agent tells it. `copies` is a folder of the node's own, and ""
    where the node sees the run folder's disk."""

    role: str
    rank: int
    world: int
    local_rank: int
    device: int
    generation: int
    folder: Path
    dial: Dial = field(repr=False)
    node: str = ""
    copies: str = ""


def error_to_dict(error: MeshwrightError) -> dict[str, Any]:
    """An error as JSON, under the nearest class of ERRORS."""
    kind = next(name for name in (base.__name__ for base in type(error).__mro__) if name in ERRORS)
    problems = [[problem.where, problem.what, problem.nearest] for problem in error.problems]
    return {"kind": kind, "problems": problems, "resume": error.resume if isinstance(error, RunFailed) else ""}


def error_from_dict(error: Mapping[str, Any]) -> MeshwrightError:
    """The inverse of `error_to_dict`."""
    problems = [Problem(*texts) for texts in error["problems"]]
    if error["kind"] == "RunFailed":
        return RunFailed(problems, resume=error["resume"])
    return ERRORS[error["kind"]](problems)
