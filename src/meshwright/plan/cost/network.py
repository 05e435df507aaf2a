"""Seconds of communication: latency, a ramp with size, and bandwidth (alpha-beta) per tier, by algorithm.

Formulas: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005); sums in
the switch as in NCCL's NVLS. A collective's bus bandwidth is bytes on the wire of one rank over its time, as nccl-tests
defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.cluster import Cluster
from meshwright.plan.constants import Profile


@dataclass(frozen=True)
class CommGroup:
    """A group of `ranks` devices, `near` of them on one inner link (a node, or a rack behind one switch)."""

    ranks: int
    near: int

    @property
    def islands(self) -> int:
        """Number of inner links that the group spans."""
        return -(-self.ranks // self.near)


class Network:
    """Seconds of NCCL's collectives on a cluster's links, by a profile's constants."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        constants = profile.constants
        self.intra, self.inter, self.domain = cluster.intra, cluster.inter, cluster.domain
        self.ramp, self.ramp_bytes = constants["cuda.net.ramp_seconds"], constants["cuda.net.ramp_bytes"]
        self.start, self.jitter = constants["cuda.net.start_seconds"], constants["cuda.net.jitter_seconds"]
        self.ring_share, self.few_ranks = constants["cuda.net.ring_share"], constants["cuda.net.few_ranks"]
        self.gather_share, self.tree_share = constants["cuda.net.gather_share"], constants["cuda.net.tree_share"]
        self.inter_share = min(1.0, constants["cuda.net.inter_share"])
        self.switch_share = constants["cuda.net.switch_share"]
        self.intra_hop, self.inter_hop = self.intra.latency_seconds, self.inter.latency_seconds

    def group(self, ranks: int, stride: int) -> CommGroup:
        """The group of `ranks` devices that lie `stride` apart."""
        return CommGroup(ranks, max(1, min(ranks, self.domain // stride)))

    def all_reduce(self, size_bytes: float, group: CommGroup) -> float:
        """All-reduce of `size_bytes` on every rank: the faster of a ring and a tree; `bandwidth` knows of sums in the
        switch."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        wire = 2 * (n - 1) / n * size_bytes
        bandwidth = self.bandwidth(group, summed=True)
        ring = 2 * self._ring_hops(group) + self.wire_seconds(wire, bandwidth)
        tree = 2 * self._tree_hops(group) + self.wire_seconds(2 * size_bytes, bandwidth)
        return self.start + self.straggler_seconds(n) + min(ring, tree)

    def all_gather(self, size_bytes: float, group: CommGroup) -> float:
        """All-gather into `size_bytes` on every rank: a ring of ranks - 1 steps."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        wire = (n - 1) / n * size_bytes
        latency = self.start + self.straggler_seconds(n) + self._ring_hops(group)
        return latency + self.wire_seconds(wire, self.bandwidth(group))

    def reduce_scatter(self, size_bytes: float, group: CommGroup) -> float:
        """Reduce-scatter of `size_bytes` on every rank: the mirror of all-gather."""
        return self.all_gather(size_bytes, group)

    def all_to_all(self, size_bytes: float, group: CommGroup) -> float:
        """All-to-all of `size_bytes` on every rank. What leaves the inner link uses the rank's share of the network, at
        the same time as what stays."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        near, far = (group.near - 1) / n * size_bytes, (n - group.near) / n * size_bytes
        inside = self.wire_seconds(near, self._inside(group.near, summed=False))
        outside = self.wire_seconds(far, self.inter.bytes_per_second * self.inter_share)
        hop = self.intra_hop if group.islands == 1 else self.inter_hop
        return self.start + self.straggler_seconds(n) + 2 * hop + max(inside, outside)

    def point_to_point(self, size_bytes: float, *, far: bool) -> float:
        """One message of `size_bytes` to another rank; `far`: over the network between nodes."""
        link, hop = (self.inter, self.inter_hop) if far else (self.intra, self.intra_hop)
        rate = min(link.bytes_per_second, link.peer_bytes_per_second or link.bytes_per_second)
        return self.start + hop + self.wire_seconds(size_bytes, rate * (self.inter_share if far else self.ring_share))

    def bandwidth(self, group: CommGroup, *, summed: bool = False) -> float:
        """Bus bandwidth of a large collective; `summed` for all-reduce. Between nodes the group has its ranks' shares
        of the network: groups side by side share the node's network cards."""
        inside = self._inside(group.near, summed=summed)
        if group.islands == 1:
            return inside
        outside = group.near * self.inter.bytes_per_second * self.inter_share
        return outside if group.near == 1 else min(inside, outside)

    def wire_seconds(self, wire_bytes: float, bandwidth: float) -> float:
        """Seconds of `wire_bytes` after the start, with a ramp until protocols and channels are at full speed."""
        if wire_bytes <= 0:
            return 0.0
        return wire_bytes / bandwidth + self.ramp * wire_bytes / (wire_bytes + self.ramp_bytes)

    def straggler_seconds(self, ranks: int) -> float:
        """Wait for the last rank of a collective, since ranks do not arrive at the same time."""
        return self.jitter * math.log2(ranks)

    def _inside(self, near: int, *, summed: bool) -> float:
        """Bus bandwidth of a collective over `near` devices on one inner link."""
        link = self.intra
        if near <= 1:
            return link.bytes_per_second * self.ring_share
        if link.measured_bus:
            return link.measured_bus * (1.0 if summed else self.gather_share)
        if summed and link.switch_bus and near > SWITCH_FROM_RANKS:
            return link.switch_bus * self.switch_share
        rate = link.bytes_per_second
        if link.topology == "mesh":  # a direct wire to each of the others
            rate = min(rate, (link.peer_bytes_per_second or rate) * (near - 1))
        elif link.topology == "pcie" and near > 2:  # all devices share one bus, in both directions
            rate *= self.tree_share
        return rate * self.ring_share * (1 - self.few_ranks / near) * (1.0 if summed else self.gather_share)

    def _ring_hops(self, group: CommGroup) -> float:
        if group.islands == 1:
            return (group.ranks - 1) * self.intra_hop
        return group.islands * self.inter_hop + (group.ranks - group.islands) * self.intra_hop

    def _tree_hops(self, group: CommGroup) -> float:
        """Chains inside the inner link, a tree between them."""
        between = math.ceil(math.log2(group.islands)) * self.inter_hop if group.islands > 1 else 0.0
        return (group.near - 1) * self.intra_hop + between


#: Below this many ranks NCCL's sums in the switch gain nothing (ml-engineering's runs on 4 to 8 H200 and B200).
SWITCH_FROM_RANKS = 5


class GlooNetwork(Network):
    """Seconds of gloo's collectives between the processes of one machine, or over sockets between machines."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        self.intra, self.inter, self.domain = cluster.intra, cluster.inter, cluster.domain
        self.share = {name: profile[f"cpu.net.{name}.share"] for name in COLLECTIVES}
        self.latency = {name: profile[f"cpu.net.{name}.latency"] for name in COLLECTIVES}

    def _seconds(self, collective: str, wire_bytes: float, hops: float, far: bool) -> float:
        link = self.inter if far else self.intra
        latency = link.latency_seconds * self.latency[collective] * hops
        return latency + wire_bytes / (link.bytes_per_second * self.share[collective])

    def all_reduce(self, size_bytes: float, group: CommGroup) -> float:
        """All-reduce of `size_bytes` on every rank, in a ring: each sends 2 (n - 1) / n of them."""
        return self._ring("all_reduce", 2 * size_bytes, group)

    def all_gather(self, size_bytes: float, group: CommGroup) -> float:
        """All-gather into `size_bytes` on every rank."""
        return self._ring("all_gather", size_bytes, group)

    def reduce_scatter(self, size_bytes: float, group: CommGroup) -> float:
        """Reduce-scatter of `size_bytes` on every rank."""
        return self._ring("reduce_scatter", size_bytes, group)

    def all_to_all(self, size_bytes: float, group: CommGroup) -> float:
        """One message to each other rank, one after another."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        return self._seconds("point_to_point", size_bytes * (n - 1) / n, n - 1, group.islands > 1)

    def point_to_point(self, size_bytes: float, *, far: bool) -> float:
        """One message to another rank."""
        return self._seconds("point_to_point", size_bytes, 1, far)

    def _ring(self, collective: str, size_bytes: float, group: CommGroup) -> float:
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        return self._seconds(collective, size_bytes * (n - 1) / n, math.log2(n), group.islands > 1)


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "point_to_point")


def network(cluster: Cluster, profile: Profile) -> Network:
    """The network model of a cluster by a profile's constants."""
    return GlooNetwork(cluster, profile) if cluster.device.kind == "cpu" else Network(cluster, profile)
