"""Seconds that moving bytes takes: latency, a ramp with size and bandwidth (alpha-beta) per tier, by algorithm.

Formulas: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005); sums in
the switch as NCCL's NVLS does them. A collective's bus bandwidth is bytes on the wire of one rank over its time, as
nccl-tests defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.cluster import Cluster
from meshwright.plan.constants import Profile


@dataclass(frozen=True)
class CommGroup:
    """`ranks` devices that talk, `near` of them joined by one inner link (a node, or a rack behind one switch)."""

    ranks: int
    near: int

    @property
    def islands(self) -> int:
        """Inner links that the group spreads over."""
        return -(-self.ranks // self.near)


class Network:
    """The wires of a cluster as a profile's constants see them."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        constants = profile.constants
        self.intra, self.inter, self.domain = cluster.intra, cluster.inter, cluster.domain
        self.ramp, self.ramp_bytes = constants["cuda.net.ramp_seconds"], constants["cuda.net.ramp_bytes"]
        self.start, self.jitter = constants["cuda.net.start_seconds"], constants["cuda.net.jitter_seconds"]
        self.ring_share, self.few_ranks = constants["cuda.net.ring_share"], constants["cuda.net.few_ranks"]
        self.gather_share, self.tree_share = constants["cuda.net.gather_share"], constants["cuda.net.tree_share"]
        self.inter_share, self.switch_share = (
            min(1.0, constants["cuda.net.inter_share"]),
            constants["cuda.net.switch_share"],
        )
        self.intra_hop, self.inter_hop = self.intra.latency_seconds, self.inter.latency_seconds

    def group(self, ranks: int, stride: int) -> CommGroup:
        """The group of `ranks` devices that lie `stride` apart."""
        return CommGroup(ranks, max(1, min(ranks, self.domain // stride)))

    def all_reduce(self, size_bytes: float, group: CommGroup) -> float:
        """All-reduce of `size_bytes` held by every rank: a ring, or a tree where latency counts for more, or sums made
        in the switch."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        wire = 2 * (n - 1) / n * size_bytes
        bandwidth = self.bandwidth(group, summed=True)
        ring = 2 * self._ring_hops(group) + self.moving(wire, bandwidth)
        tree = 2 * self._tree_hops(group) + self.moving(2 * size_bytes, bandwidth)
        return self.start + self.waiting(n) + min(ring, tree)

    def all_gather(self, size_bytes: float, group: CommGroup) -> float:
        """All-gather into `size_bytes` on every rank: a ring of ranks - 1 steps."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        wire = (n - 1) / n * size_bytes
        return self.start + self.waiting(n) + self._ring_hops(group) + self.moving(wire, self.bandwidth(group))

    def reduce_scatter(self, size_bytes: float, group: CommGroup) -> float:
        """Reduce-scatter of `size_bytes` held by every rank; the mirror of all-gather."""
        return self.all_gather(size_bytes, group)

    def all_to_all(self, size_bytes: float, group: CommGroup) -> float:
        """All-to-all in which every rank holds `size_bytes` and keeps one part: what leaves the inner link goes by the
        rank's own share of the network, beside what stays."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        near, far = (group.near - 1) / n * size_bytes, (n - group.near) / n * size_bytes
        inside = self.moving(near, self._inside(group.near, summed=False))
        outside = self.moving(far, self.inter.bytes_per_second * self.inter_share)
        hop = self.intra_hop if group.islands == 1 else self.inter_hop
        return self.start + self.waiting(n) + 2 * hop + max(inside, outside)

    def point_to_point(self, size_bytes: float, *, far: bool) -> float:
        """One message of `size_bytes` to a neighbour, `far` across the network between nodes."""
        link, hop = (self.inter, self.inter_hop) if far else (self.intra, self.intra_hop)
        rate = min(link.bytes_per_second, link.peer_bytes_per_second or link.bytes_per_second)
        return self.start + hop + self.moving(size_bytes, rate * (self.inter_share if far else self.ring_share))

    def bandwidth(self, group: CommGroup, *, summed: bool = False) -> float:
        """Bus bandwidth of a large collective; `summed` for all-reduce. Between nodes every rank of the group brings
        its own share of the network, and groups side by side share the node's cards by bringing their own."""
        inside = self._inside(group.near, summed=summed)
        if group.islands == 1:
            return inside
        outside = group.near * self.inter.bytes_per_second * self.inter_share
        return outside if group.near == 1 else min(inside, outside)

    def moving(self, wire_bytes: float, bandwidth: float) -> float:
        """Seconds for `wire_bytes` once they flow: protocols and channels take a while to come to speed."""
        if wire_bytes <= 0:
            return 0.0
        return wire_bytes / bandwidth + self.ramp * wire_bytes / (wire_bytes + self.ramp_bytes)

    def waiting(self, ranks: int) -> float:
        """Ranks come to a collective at different times: what the last one costs the others."""
        return self.jitter * math.log2(ranks)

    def _inside(self, near: int, *, summed: bool) -> float:
        """Bus bandwidth of a collective over `near` devices of one inner link."""
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
        elif link.topology == "pcie" and near > 2:  # both ways of every device cross one bus
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


#: Below this many ranks NCCL's sums in the switch bring nothing (ml-engineering's runs on 4 to 8 H200 and B200).
SWITCH_FROM_RANKS = 5


class GlooNetwork(Network):
    """gloo between the processes of one machine, or of several by its sockets: what Network is for NCCL."""

    def __init__(self, cluster: Cluster, profile: Profile) -> None:
        self.intra, self.inter, self.domain = cluster.intra, cluster.inter, cluster.domain
        self.share = {name: profile[f"cpu.net.{name}.share"] for name in COLLECTIVES}
        self.latency = {name: profile[f"cpu.net.{name}.latency"] for name in COLLECTIVES}

    def _seconds(self, collective: str, wire_bytes: float, hops: float, far: bool) -> float:
        link = self.inter if far else self.intra
        latency = link.latency_seconds * self.latency[collective] * hops
        return latency + wire_bytes / (link.bytes_per_second * self.share[collective])

    def all_reduce(self, size_bytes: float, group: CommGroup) -> float:
        """A ring: every rank sends 2 (n - 1) / n of the tensor."""
        return self._ring("all_reduce", 2 * size_bytes, group)

    def all_gather(self, size_bytes: float, group: CommGroup) -> float:
        """All-gather into `size_bytes` on every rank."""
        return self._ring("all_gather", size_bytes, group)

    def reduce_scatter(self, size_bytes: float, group: CommGroup) -> float:
        """Reduce-scatter of `size_bytes` held by every rank."""
        return self._ring("reduce_scatter", size_bytes, group)

    def all_to_all(self, size_bytes: float, group: CommGroup) -> float:
        """As many messages as there are others, one after another."""
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        return self._seconds("point_to_point", size_bytes * (n - 1) / n, n - 1, group.islands > 1)

    def point_to_point(self, size_bytes: float, *, far: bool) -> float:
        """One message to a neighbour."""
        return self._seconds("point_to_point", size_bytes, 1, far)

    def _ring(self, collective: str, size_bytes: float, group: CommGroup) -> float:
        n = group.ranks
        if n <= 1 or size_bytes <= 0:
            return 0.0
        return self._seconds(collective, size_bytes * (n - 1) / n, math.log2(n), group.islands > 1)


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "point_to_point")


def network(cluster: Cluster, profile: Profile) -> Network:
    """The wires of a cluster as a profile sees them."""
    return GlooNetwork(cluster, profile) if cluster.device.kind == "cpu" else Network(cluster, profile)
