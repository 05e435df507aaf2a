"""The wires of a cluster by what it is made of: NCCL between GPUs, gloo between the processes of cores."""

from __future__ import annotations

from functools import lru_cache

from meshwright.cluster import Cluster, Device, Link
from meshwright.plan.cpu import GlooNetwork
from meshwright.plan.network import Group, Network
from meshwright.plan.profile import DATASHEET, Profile


def network(cluster: Cluster, profile: Profile) -> Network:
    """The wires of a cluster as a profile sees them."""
    return GlooNetwork(cluster, profile) if cluster.device.kind == "cpu" else Network(cluster, profile)


def all_reduce_seconds(size_bytes: float, ranks: int, link: Link) -> float:
    """All-reduce over `ranks` devices of one link, by the data sheet's constants."""
    return _of_link(link, ranks).all_reduce(size_bytes, Group(ranks, ranks))


def point_to_point_seconds(size_bytes: float, link: Link) -> float:
    """One message to a neighbour, by the data sheet's constants."""
    return _of_link(link, 2).point_to_point(size_bytes, far=False)


@lru_cache(maxsize=256)
def _of_link(link: Link, ranks: int) -> Network:
    device = Device("any", "cpu" if link.topology == "host" else "cuda", 1, {"fp32": 1.0}, 1.0, 0.0)
    return network(Cluster(device, max(1, ranks), max(1, ranks), link, link), DATASHEET)
