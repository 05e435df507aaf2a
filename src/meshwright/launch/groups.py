"""What is started and where: groups of ranks, nodes, and which rank goes to which node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshwright.errors import CannotWork, InputError, Problem


@dataclass(frozen=True)
class Need:
    """What one rank takes of a node: a device of `kind` where `devices` is 1, `cores`, bytes of the host's memory.

    0 cores or bytes: whatever there is. A rank without a device (a data worker) goes to any node.
    """

    kind: str = "cpu"
    devices: int = 1
    cores: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class RankGroup:
    """Ranks that call `function(payload, context)`, all or none: where one fails, the others of the group are ended.

    function: "package.module:function", importable on every node; payload: JSON. Each run of `near` ranks, counted from
    rank 0, is placed on one node, and a node gets at most `most_per_node` (0: as many as fit). `nodes` names those that
    may be used, in the order in which they are filled (none: all, as they come). `env` are more environment variables,
    `keep_memory` says whether a rank keeps the host's memory that it frees, which is quicker and takes more.
    """

    role: str
    function: str
    payload: Mapping[str, Any]
    ranks: int
    near: int = 1
    most_per_node: int = 0
    nodes: tuple[str, ...] = ()
    need: Need = field(default_factory=Need)
    env: Mapping[str, str] = field(default_factory=dict)
    keep_memory: bool = True


@dataclass(frozen=True)
class Node:
    """A machine: how other nodes reach it, what it has, the speed that its network interface states (0: none), and in
    how many seconds it ends (None: not known to end)."""

    name: str
    address: str = ""
    interface: str = "lo"
    kind: str = "cpu"
    devices: int = 1
    cores: int = 1
    memory_bytes: int = 0
    link_bytes_per_second: float = 0.0
    leaving_seconds: float | None = None


@dataclass(frozen=True)
class Place:
    """Where one rank runs: the node, its number among the ranks of its role there, and the index of its device."""

    role: str
    rank: int
    node: str
    local_rank: int
    device: int


def place(groups: Sequence[RankGroup], nodes: Sequence[Node]) -> tuple[Place, ...]:
    """The place of every rank: nodes are filled in their order, and ranks that must be near share a node.

    Raises CannotWork naming what lacks, and the most that could be placed; InputError for two groups of one role.
    """
    roles = [group.role for group in groups]
    if len(set(roles)) < len(roles):
        raise InputError(Problem("launch", f"two groups have one role: {', '.join(roles)}"))
    free = {node.name: _Free(node) for node in nodes if node.leaving_seconds is None}
    places: list[Place] = []
    for group in groups:
        if group.ranks < 1 or group.ranks % group.near:
            what = f"{group.ranks} ranks in sets of {group.near} that share a node"
            raise CannotWork(Problem(f"role {group.role}", what, f"nearest: {max(1, group.ranks // group.near)} sets"))
        rank = 0
        for node in [free[name] for name in group.nodes if name in free] if group.nodes else free.values():
            sets = min(node.sets(group), (group.ranks - rank) // group.near)
            for _ in range(sets * group.near):
                places.append(node.take(group, rank))
                rank += 1
        if rank < group.ranks:
            raise CannotWork(_lack(group, rank, nodes))
    return tuple(places)


class _Free:
    """What is left of a node while ranks are placed."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.devices, self.cores, self.memory_bytes = node.devices, node.cores, node.memory_bytes
        self.local_ranks: dict[str, int] = {}

    def sets(self, group: RankGroup) -> int:
        """How many sets of near ranks of `group` still go here."""
        need = group.need
        if need.devices and need.kind != self.node.kind:
            return 0
        limits = [(group.most_per_node or group.ranks) // group.near]
        for asked, left in (
            (need.devices, self.devices),
            (need.cores, self.cores),
            (need.memory_bytes, self.memory_bytes),
        ):
            if asked:
                limits.append(max(0, left) // (asked * group.near))
        return min(limits)

    def take(self, group: RankGroup, rank: int) -> Place:
        device = self.node.devices - self.devices
        self.devices -= group.need.devices
        self.cores -= group.need.cores
        self.memory_bytes -= group.need.memory_bytes
        local_rank = self.local_ranks.get(group.role, 0)
        self.local_ranks[group.role] = local_rank + 1
        return Place(group.role, rank, self.node.name, local_rank, device)


def _lack(group: RankGroup, placed: int, nodes: Sequence[Node]) -> Problem:
    """In words: what the ranks of `group` need and what there is."""
    need = group.need
    asked = [f"{group.ranks} ranks"]
    if need.devices:
        asked.append(f"a {need.kind} device each")
    if need.cores:
        asked.append(f"{need.cores} cores each")
    if need.memory_bytes:
        asked.append(f"{need.memory_bytes / 2**30:.3g} GiB each")
    if group.nodes:
        asked.append(f"on {', '.join(group.nodes)}")
    if group.near > 1:
        asked.append(f"{group.near} on one node")
    if group.most_per_node:
        asked.append(f"at most {group.most_per_node} on a node")
    what = f"asks for {', '.join(asked)}; there are {nodes_in_words(nodes)}"
    return Problem(f"role {group.role}", what, f"nearest: {placed} ranks")


def nodes_in_words(nodes: Sequence[Node]) -> str:
    """ "2 nodes: a (4 cpu devices, 4 cores, 8 GiB), b (...)"; a node that ends says so."""
    if not nodes:
        return "no nodes"
    texts = []
    for node in nodes:
        text = f"{node.devices} {node.kind} devices, {node.cores} cores, {node.memory_bytes / 2**30:.3g} GiB"
        if node.leaving_seconds is not None:
            text += f", ends in {node.leaving_seconds:.0f} s"
        texts.append(f"{node.name} ({text})")
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}: {', '.join(texts)}"
