"""The wires of a cluster by what it is made of: NCCL between GPUs, gloo between the processes of cores."""

from __future__ import annotations

from meshwright.cluster import Cluster
from meshwright.plan.cpu import GlooNetwork
from meshwright.plan.network import Network
from meshwright.plan.profile import Profile


def network(cluster: Cluster, profile: Profile) -> Network:
    """The wires of a cluster as a profile sees them."""
    return GlooNetwork(cluster, profile) if cluster.device.kind == "cpu" else Network(cluster, profile)
