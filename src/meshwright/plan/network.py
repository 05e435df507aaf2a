"""Seconds that moving bytes takes: latency and bandwidth per link (alpha-beta), for ring and tree collectives.

Formulas: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
"""

from __future__ import annotations

import math

from meshwright.cluster import Link

#: Share of a link's stated bandwidth that large collectives reach, and the bytes at which a message reaches half of it.
LINK_EFFICIENCY = 0.8
HALF_SPEED_BYTES = 64 * 1024


def point_to_point_seconds(size_bytes: float, link: Link) -> float:
    """One message of `size_bytes` to a neighbour."""
    return link.latency_seconds + _wire_seconds(size_bytes, link)


def all_gather_seconds(size_bytes: float, ranks: int, link: Link) -> float:
    """All-gather into `size_bytes` on every one of `ranks` ranks: a ring of ranks - 1 steps."""
    if ranks <= 1:
        return 0.0
    return _steps(ranks) * link.latency_seconds + _wire_seconds(size_bytes * (ranks - 1) / ranks, link)


def reduce_scatter_seconds(size_bytes: float, ranks: int, link: Link) -> float:
    """Reduce-scatter of `size_bytes` held by every rank; the mirror of all-gather."""
    return all_gather_seconds(size_bytes, ranks, link)


def all_reduce_seconds(size_bytes: float, ranks: int, link: Link) -> float:
    """All-reduce of `size_bytes`: reduce-scatter and all-gather, or a tree where latency counts for more."""
    if ranks <= 1:
        return 0.0
    ring = 2 * all_gather_seconds(size_bytes, ranks, link)
    hops = 2 * math.ceil(math.log2(ranks))
    tree = hops * link.latency_seconds + 2 * _wire_seconds(size_bytes, link)
    return min(ring, tree)


def _steps(ranks: int) -> float:
    """Latencies paid by a ring: every step for a few ranks, pipelined beyond (channels run side by side)."""
    return min(ranks - 1, 8 + math.log2(ranks))


def _wire_seconds(size_bytes: float, link: Link) -> float:
    if size_bytes <= 0:
        return 0.0
    return (size_bytes + HALF_SPEED_BYTES) / (link.bytes_per_second * LINK_EFFICIENCY)
