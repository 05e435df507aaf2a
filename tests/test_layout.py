"""Layouts, where ranks sit, and the boxes that they hold."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.layout import AXIS_RULES, Box, Layout, coordinates


def test_degrees() -> None:
    layout = Layout(dp=4, shard=2, tp=2, pp=3, micro_batch=2)
    assert layout.devices == 24
    assert layout.replicate == 2
    assert layout.micro_batches(global_batch=32) == 4


def test_short_names() -> None:
    assert str(Layout()) == "1 device micro1"
    assert str(Layout(dp=2, shard=2, tp=2, pp=2, sequence_parallel=True, recompute="full")) == (
        "dp2 tp2 pp2 shard2 sp 1f1b recompute=full micro1"
    )
    assert str(Layout(dp=2, offload=True)) == "dp2 offload micro1"


def test_as_dict_makes_the_layout_again() -> None:
    layout = Layout(dp=2, tp=4, schedule="gpipe", offload=True)
    assert Layout(**layout.as_dict()) == layout


degrees = st.integers(1, 3)


@given(degrees, degrees, degrees, degrees, degrees)
def test_every_rank_has_its_own_place(replicate: int, shard: int, tp: int, pp: int, cp: int) -> None:
    layout = Layout(dp=replicate * shard, shard=shard, tp=tp, pp=pp, cp=cp)
    places = [coordinates(layout, rank) for rank in range(layout.devices)]
    assert len(set(places)) == layout.devices
    # every data-parallel index is held by tp x pp x cp ranks
    counts = dict.fromkeys(range(layout.dp), 0)
    for place in places:
        counts[place.dp(layout)] += 1
    assert set(counts.values()) == {tp * pp * cp}


def test_tensor_parallel_neighbours_are_adjacent() -> None:
    layout = Layout(dp=2, tp=2, pp=2)
    assert [coordinates(layout, rank).tp for rank in range(4)] == [0, 1, 0, 1]
    assert [coordinates(layout, rank).pp for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]


def test_a_rank_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="outside a layout of 2"):
        coordinates(Layout(dp=2), 2)


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 1), st.integers(1, 5))
def test_parts_of_a_box_cover_it_once(shape: tuple[int, int], dim: int, parts: int) -> None:
    whole = Box.whole(shape)
    pieces = [whole.split(dim, parts, index) for index in range(parts)]
    assert sum(piece.elements for piece in pieces) == whole.elements
    for one, other in product(pieces, pieces):
        if one is not other:
            assert one.intersect(other) is None


def test_intersections() -> None:
    one, other = Box((8, 4), (0, 0), (6, 4)), Box((8, 4), (4, 1), (4, 2))
    assert one.intersect(other) == Box((8, 4), (4, 1), (2, 2))
    assert other.intersect(one) == one.intersect(other)
    with pytest.raises(ValueError, match="different tensors"):
        one.intersect(Box.whole((8, 5)))


def test_the_table_of_axes_names_mesh_axes() -> None:
    assert set(AXIS_RULES.values()) <= {"tp", "ep", None}
