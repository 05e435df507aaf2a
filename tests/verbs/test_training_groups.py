from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import Job, verbs
from meshwright.cluster import cpu_cluster
from meshwright.errors import RunFailed
from meshwright.launch import Node, Wait, Waited
from meshwright.launch.messages import Failure, NodeJoined, NodeLost
from meshwright.plan import Plan
from meshwright.run import RunFolder
from meshwright.verbs.training_groups import Share, TrainingGroups, equal_share

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


def test_nodes_that_need_to_be_sent_least_are_taken(tmp_path: Path) -> None:
    """Of four equal nodes two are wanted. Those at work hold the run's files: when one is lost, a spare that has copied
    them comes before one that has not."""
    job = Job(
        model={"family": "llama", "layers": 1, "hidden": 8, "heads": 1, "ffn": 8, "vocab": 300},
        data={"seq_len": 8},
        train={"steps": 10, "lr": 1e-3, "global_batch": 4},
        cluster={"devices": 2},
        launch={"on": "agents", "address": "127.0.0.1:0"},
    )
    nodes = [Node(name, devices=1) for name in ("a", "b", "c", "d")]
    used: list[list[str]] = []

    def plan_for(share: Share) -> Plan:
        used.append([node.name for node in share.nodes])
        return verbs.plan(job, cluster=cpu_cluster(share.devices))

    groups = TrainingGroups(job, RunFolder(tmp_path).create(), plan_for, resume=False, may_grow=True)
    groups(None, nodes)
    groups.begin()
    for name, count in (("a", 100), ("b", 100), ("d", 50)):
        groups.holds(name, 0)
        groups.holds(name, count)
    groups(NodeLost(nodes[0], "silent", "gone"), nodes[1:])
    failure = Failure("rank", 0, "a", 1, "silent", "gone", 1.0)
    assert isinstance(groups(failure, nodes[1:]), list)
    assert used[0] == ["a", "b"] and used[-1] == ["b", "d"]


def test_fewer_devices_are_taken_once_all_have_been_waited_for(tmp_path: Path) -> None:
    job = Job(
        model={"family": "llama", "layers": 1, "hidden": 8, "heads": 1, "ffn": 8, "vocab": 300},
        data={"seq_len": 8},
        train={"steps": 10, "lr": 1e-3, "global_batch": 4},
        cluster={"devices": 2},
        launch={"on": "agents", "address": "127.0.0.1:0", "devices_min": 1, "timeout_seconds": 7.0},
    )
    one = [Node("a", devices=1)]

    def plan_for(share: Share) -> Plan:
        return verbs.plan(job, cluster=cpu_cluster(share.devices))

    groups = TrainingGroups(job, RunFolder(tmp_path), plan_for, resume=False, may_grow=True)
    assert groups(None, one) == Wait(7.0) == groups(NodeJoined(one[0]), one)
    (group,) = groups(Waited(), one)  # type: ignore[misc]
    assert (group.ranks, group.nodes) == (1, ("a",))
    with pytest.raises(RunFailed, match=r"1 devices are needed; there are no nodes after 7 s .*launch\.agent --run"):
        groups(Waited(), [])
