from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch import Node
from meshwright.verbs.training_groups import equal_share

NODES = st.lists(st.builds(Node, name=st.just("n"), kind=st.sampled_from(["cpu", "cuda"]), devices=st.integers(0, 6)))


@given(NODES, st.none() | st.integers(1, 20))
def test_the_share_is_equal_of_one_kind_and_the_largest(nodes: list[Node], wanted: int | None) -> None:
    share = equal_share(nodes, wanted)
    sizes = {
        per_node * count: (per_node, count)
        for kind in ("cpu", "cuda")
        for per_node in range(1, 7)
        for count in range(1, sum(node.kind == kind and node.devices >= per_node for node in nodes) + 1)
        if wanted is None or per_node * count <= wanted
    }
    if share is None:
        assert not sizes
        return
    assert share.devices == max(sizes)
    assert len({node.kind for node in share.nodes}) == 1
    assert all(node.devices >= share.per_node for node in share.nodes)
    # Of equal sizes the one on fewer nodes: fewer links.
    assert not any(
        kind_nodes >= share.devices // per_node
        for per_node in range(share.per_node + 1, 7)
        if share.devices % per_node == 0
        for kind_nodes in [
            max(sum(node.kind == kind and node.devices >= per_node for node in nodes) for kind in ("cpu", "cuda"))
        ]
    )
