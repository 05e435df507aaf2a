"""Nodes and groups of ranks in the form that goes over the wire, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence

from meshwright.launch.groups import Node, Place, RankGroup
from meshwright.launch.wire import hub_pb2 as wire

#: Fields of a Node that its agent states.
NODE_FIELDS = ("name", "address", "interface", "kind", "devices", "cores", "memory_bytes", "link_bytes_per_second")


def wire_node(node: Node) -> wire.Node:
    """A node for the wire."""
    return wire.Node(**{name: getattr(node, name) for name in NODE_FIELDS})


def node_of(node: wire.Node) -> Node:
    """The inverse of `wire_node`."""
    return Node(**{name: getattr(node, name) for name in NODE_FIELDS})


def role_spec(group: RankGroup, here: Sequence[Place]) -> wire.RoleSpec:
    """Those ranks of a group that have the places `here`, for the agent that starts them."""
    ranks = [
        wire.RankSpec(
            name=wire.RankName(role=place.role, rank=place.rank),
            local_rank=place.local_rank,
            world=group.ranks,
            device=place.device,
        )
        for place in here
        if place.role == group.role
    ]
    return wire.RoleSpec(
        role=group.role,
        function=group.function,
        payload=json.dumps(group.payload, allow_nan=True).encode(),
        environment=dict(group.env),
        keep_memory=group.keep_memory,
        ranks=ranks,
    )
