from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import CannotWork, InputError
from meshwright.launch import Need, Node, RankGroup
from meshwright.launch.groups import Place, place

KINDS = ("cpu", "cuda")


def nodes() -> st.SearchStrategy[list[Node]]:
    node = st.builds(
        Node,
        name=st.just(""),
        kind=st.sampled_from(KINDS),
        devices=st.integers(0, 5),
        cores=st.integers(1, 8),
        memory_bytes=st.integers(0, 8),
        leaving_seconds=st.sampled_from([None, None, None, 30.0]),
    )
    return st.lists(node, max_size=5).map(
        lambda found: [Node(**{**vars(one), "name": f"n{index}"}) for index, one in enumerate(found)]
    )


def groups(role: str = "rank") -> st.SearchStrategy[RankGroup]:
    need = st.builds(
        Need,
        kind=st.sampled_from(KINDS),
        devices=st.integers(0, 1),
        cores=st.integers(0, 3),
        memory_bytes=st.integers(0, 3),
    )
    return st.builds(
        lambda near, sets, most, need: RankGroup(role, "m:f", {}, near * sets, near, most, need=need),
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(0, 4),
        need,
    )


def sets_that_fit(group: RankGroup, node: Node) -> int:
    """How many sets of near ranks an empty node takes, by trying."""
    if node.leaving_seconds is not None:
        return 0
    for sets in itertools.count(1):
        ranks, need = sets * group.near, group.need
        enough = (
            (not need.devices or (need.kind == node.kind and ranks <= node.devices))
            and ranks * need.cores <= (node.cores if need.cores else 0)
            and ranks * need.memory_bytes <= (node.memory_bytes if need.memory_bytes else 0)
            and (not group.most_per_node or ranks <= group.most_per_node)
            and ranks <= group.ranks
        )
        if not enough:
            return sets - 1
    raise AssertionError


def check(group: RankGroup, places: Sequence[Place], there: Sequence[Node]) -> None:
    """That `places`, of one group, keep every promise that does not depend on other groups."""
    known = {node.name: node for node in there}
    assert [one.rank for one in places] == list(range(group.ranks))
    for first in range(0, group.ranks, group.near):
        assert len({one.node for one in places[first : first + group.near]}) == 1
    for name, count in Counter(one.node for one in places).items():
        assert known[name].leaving_seconds is None
        assert not group.most_per_node or count <= group.most_per_node
        assert not group.need.devices or known[name].kind == group.need.kind
        assert sorted(one.local_rank for one in places if one.node == name) == list(range(count))


@given(groups(), nodes())
def test_one_group_is_placed_where_it_can_be_and_else_not_at_all(group: RankGroup, there: list[Node]) -> None:
    possible = sum(sets_that_fit(group, node) for node in there) * group.near >= group.ranks
    try:
        places = place([group], there)
    except CannotWork as error:
        assert not possible, error
    else:
        assert possible
        check(group, places, there)


@given(groups("rank"), groups("data"), nodes())
def test_groups_share_nodes_and_no_device_is_given_twice(one: RankGroup, two: RankGroup, there: list[Node]) -> None:
    try:
        places = place([one, two], there)
    except CannotWork:
        return
    for group in (one, two):
        check(group, [found for found in places if found.role == group.role], there)
    need = {"rank": one.need, "data": two.need}
    for node in there:
        here = [found for found in places if found.node == node.name]
        devices = [found.device for found in here if need[found.role].devices]
        assert len(set(devices)) == len(devices)
        assert set(devices) <= set(range(node.devices))
        for what, limit in (("cores", node.cores), ("memory_bytes", node.memory_bytes)):
            assert sum(getattr(need[found.role], what) for found in here) <= limit


TWO = (Node("a", devices=2, cores=4, memory_bytes=2**33), Node("b", devices=2, cores=4, memory_bytes=2**33))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (RankGroup("rank", "m:f", {}, 5), ("5 ranks, a cpu device each", "2 nodes: a (2 cpu devices", "4 ranks")),
        (RankGroup("rank", "m:f", {}, 1, need=Need("cuda")), ("a cuda device each", "nearest: 0 ranks")),
        (RankGroup("rank", "m:f", {}, 2, need=Need(cores=5)), ("5 cores each", "4 cores")),
        (RankGroup("rank", "m:f", {}, 3, need=Need(memory_bytes=2**33)), ("8 GiB each", "nearest: 2 ranks")),
        (RankGroup("rank", "m:f", {}, 3, near=3), ("3 on one node", "nearest: 0 ranks")),
        (RankGroup("rank", "m:f", {}, 4, most_per_node=1), ("at most 1 on a node", "nearest: 2 ranks")),
        (RankGroup("rank", "m:f", {}, 4, near=3), ("4 ranks in sets of 3", "nearest: 1 sets")),
    ],
)
def test_what_lacks_is_named(group: RankGroup, words: tuple[str, ...]) -> None:
    with pytest.raises(CannotWork) as raised:
        place([group], TWO)
    for word in ("role rank", *words):
        assert word in str(raised.value)


def test_a_node_that_ends_says_so() -> None:
    ending = Node("a", devices=2, leaving_seconds=12.0)
    with pytest.raises(CannotWork, match="ends in 12 s"):
        place([RankGroup("rank", "m:f", {}, 1)], [ending])


def test_two_groups_of_one_role_are_refused() -> None:
    group = RankGroup("rank", "m:f", {}, 1)
    with pytest.raises(InputError, match="rank, rank"):
        place([group, group], TWO)


def test_named_nodes_alone_are_used_in_their_order() -> None:
    there = [Node("a", devices=1), Node("b", devices=2), Node("c", devices=2)]
    group = RankGroup("rank", "m:f", {}, 4, most_per_node=2, nodes=("c", "b"))
    assert [one.node for one in place([group], there)] == ["c", "c", "b", "b"]
    with pytest.raises(CannotWork, match=r"2 ranks, .*on a, .*nearest: 1 ranks"):
        place([replace(group, ranks=2, nodes=("a",))], there)
