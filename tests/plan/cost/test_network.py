"""Collectives: laws that hold whatever the constants, and nccl-tests' own figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import Cluster, Link, cpu_cluster, named_cluster
from meshwright.errors import InputError
from meshwright.plan.constants import DATASHEET
from meshwright.plan.cost.network import CommGroup, GlooNetwork, Network, network

BASE = named_cluster("h100-sxm-80gb", 512)
WIRE = Link("wire", 10e9, 5e-6)
NET = Network(replace(BASE, intra=WIRE), DATASHEET)
sizes, ranks = st.floats(1.0, 1e10), st.sampled_from([2, 4, 8, 16, 64, 512])


def group(n: int) -> CommGroup:
    return NET.group(n, 1)


def test_large_ring_all_reduce_moves_twice_the_tensor_but_one_part() -> None:
    size, n = 4e9, 8
    wire = 2 * (n - 1) / n * size / (WIRE.bytes_per_second * NET.ring_share * (1 - NET.few_ranks / n))
    assert NET.all_reduce(size, group(n)) == pytest.approx(wire, rel=1e-3)


@given(sizes)
def test_one_rank_moves_nothing(size: float) -> None:
    assert NET.all_gather(size, group(1)) == NET.all_reduce(size, group(1)) == NET.all_to_all(size, group(1)) == 0.0


@given(sizes, ranks)
def test_all_reduce_costs_at_most_scatter_and_gather(size: float, n: int) -> None:
    both = NET.reduce_scatter(size, group(n)) + NET.all_gather(size, group(n))
    assert 0 < NET.all_reduce(size, group(n)) <= both * (1 + 1e-9)


@given(sizes, ranks)
def test_more_bytes_never_take_less_time(size: float, n: int) -> None:
    for collective in (NET.all_gather, NET.all_reduce, NET.all_to_all):
        assert collective(2 * size, group(n)) > collective(size, group(n))


def test_half_of_the_ramp_is_lost_at_the_stated_size() -> None:
    seconds = NET.wire_seconds(NET.ramp_bytes, 1e9) - NET.ramp_bytes / 1e9
    assert seconds == pytest.approx(NET.ramp / 2)


@pytest.mark.parametrize(
    ("device", "collective", "n", "mebibytes", "microseconds"),
    # nccl-tests on one node, from aiconfigurator's tables (message sizes there are in elements of 2 bytes).
    [
        ("a100-sxm-80gb", "all_reduce", 8, 8, 128),
        ("a100-sxm-80gb", "all_reduce", 8, 128, 1169),
        ("a100-sxm-80gb", "all_reduce", 2, 512, 2781),
        ("a100-sxm-80gb", "all_reduce", 4, 128, 1000),
        ("a100-sxm-80gb", "all_gather", 8, 512, 2288),
        ("a100-sxm-80gb", "reduce_scatter", 4, 128, 539),
        ("a100-sxm-80gb", "all_to_all", 8, 512, 2314),
        ("h100-sxm-80gb", "all_reduce", 8, 512, 2111),
        ("h100-sxm-80gb", "all_reduce", 4, 128, 613),
        ("h100-sxm-80gb", "all_gather", 8, 128, 393),
        ("b200-sxm", "all_reduce", 8, 512, 1335),
        ("b200-sxm", "all_reduce", 2, 128, 271),
        ("b200-sxm", "all_gather", 4, 512, 711),
        ("rtx-pro-6000", "all_reduce", 8, 512, 38073),
    ],
)
def test_collectives_of_a_node_run_as_they_were_measured_to(
    device: str, collective: str, n: int, mebibytes: int, microseconds: float
) -> None:
    net = Network(named_cluster(device, 8), DATASHEET)
    seconds = getattr(net, collective)(mebibytes * 2**20, net.group(n, 1))
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.25)


def test_small_collectives_take_their_latency() -> None:
    """nccl-tests of 512 B on A100: 10, 14.5 and 22.6 us for an all-reduce of 2, 4 and 8, which start together."""
    net = Network(named_cluster("a100-sxm-80gb", 8), DATASHEET.changed({"cuda.net.jitter_seconds": 0.0}))
    for n, microseconds in ((2, 10.0), (4, 14.5), (8, 22.6)):
        assert net.all_reduce(512, net.group(n, 1)) * 1e6 == pytest.approx(microseconds, rel=0.35)


def test_sums_in_the_switch_are_quicker_than_a_ring() -> None:
    with_switch = named_cluster("h100-sxm-80gb", 8)
    without = replace(with_switch, intra=replace(with_switch.intra, switch_bus=0.0))
    fast, slow = Network(with_switch, DATASHEET), Network(without, DATASHEET)
    assert fast.all_reduce(1e9, fast.group(8, 1)) < 0.85 * slow.all_reduce(1e9, slow.group(8, 1))
    assert fast.all_gather(1e9, fast.group(8, 1)) == slow.all_gather(1e9, slow.group(8, 1))


def test_a_group_over_nodes_has_the_network_cards_of_its_ranks() -> None:
    net = Network(BASE, DATASHEET)
    alone, together = net.group(8, 64), net.group(64, 1)
    assert (alone.near, alone.islands) == (1, 8)
    assert (together.near, together.islands) == (8, 8)
    assert net.bandwidth(together) > 6 * net.bandwidth(alone)
    assert net.bandwidth(alone) <= BASE.inter.bytes_per_second


def test_a_rack_behind_one_switch_is_one_inner_link() -> None:
    rack = named_cluster("gb200", 64, 4)
    assert (rack.devices_per_node, rack.domain) == (4, 64)
    assert Network(rack, DATASHEET).group(64, 1).islands == 1
    assert named_cluster("gb200", 256, 4).domain == 64


def test_zero_bandwidth_is_bad_input() -> None:
    with pytest.raises(InputError, match="bandwidth"):
        Cluster(BASE.device, 8, 8, Link("dead", 0.0, 1e-6), WIRE)


def test_cores_talk_by_gloo() -> None:
    cores = cpu_cluster(2)
    assert isinstance(network(cores, DATASHEET), GlooNetwork)
    assert not isinstance(network(BASE, DATASHEET), GlooNetwork)
    slow, fast = network(cores, DATASHEET), network(BASE, DATASHEET)
    assert slow.all_reduce(1e6, slow.group(2, 1)) > fast.all_reduce(1e6, fast.group(2, 1)) > 0
    assert slow.point_to_point(1e6, far=False) > 0
