"""Collectives: laws that hold whatever the constants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import Link
from meshwright.plan.network import (
    HALF_SPEED_BYTES,
    LINK_EFFICIENCY,
    all_gather_seconds,
    all_reduce_seconds,
    point_to_point_seconds,
    reduce_scatter_seconds,
)

LINK = Link("wire", 10e9, 5e-6)
sizes, ranks = st.floats(1.0, 1e10), st.integers(2, 512)


def test_large_ring_all_reduce_moves_twice_the_tensor_but_one_part() -> None:
    size, n = 4e9, 8
    wire = 2 * (n - 1) / n * size / (LINK.bytes_per_second * LINK_EFFICIENCY)
    assert all_reduce_seconds(size, n, LINK) == pytest.approx(wire, rel=1e-3)


@given(sizes)
def test_one_rank_moves_nothing(size: float) -> None:
    assert all_gather_seconds(size, 1, LINK) == all_reduce_seconds(size, 1, LINK) == 0.0


@given(sizes, ranks)
def test_all_reduce_costs_at_most_scatter_and_gather(size: float, n: int) -> None:
    both = reduce_scatter_seconds(size, n, LINK) + all_gather_seconds(size, n, LINK)
    assert 0 < all_reduce_seconds(size, n, LINK) <= both * (1 + 1e-9)


@given(sizes, ranks)
def test_more_bytes_never_take_less_time(size: float, n: int) -> None:
    for collective in (all_gather_seconds, all_reduce_seconds):
        assert collective(2 * size, n, LINK) > collective(size, n, LINK)


def test_small_messages_reach_half_of_the_bandwidth_at_the_stated_size() -> None:
    seconds = point_to_point_seconds(HALF_SPEED_BYTES, LINK) - LINK.latency_seconds
    assert HALF_SPEED_BYTES / seconds == pytest.approx(LINK.bytes_per_second * LINK_EFFICIENCY / 2)
