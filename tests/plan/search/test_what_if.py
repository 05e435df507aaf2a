"""What a change saves equals the plan of the changed cluster; what limits a plan is said in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright import cluster as machine
from meshwright.cluster import GIB, Cluster, Device, Link
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import Plan, PlanRequest, make_plan
from meshwright.plan.constants import default_profile
from meshwright.plan.search.walk import TIE

MODEL = card(LlamaShape(layers=16, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=5504, vocab=32000), 2048)


def cluster(devices: int = 8, per_node: int = 4, gibibytes: float = 24, network: float = 10e9) -> Cluster:
    device = Device("gpu", "cuda", int(gibibytes * GIB), {"fp32": 60e12, "bf16": 400e12}, 2e12, 6e-6)
    return Cluster(device, devices, per_node, Link("nvlink", 200e9, 2e-6), Link("network", network, 1e-5))


def plan_of(batch: int = 32, **changes: float) -> Plan:
    return make_plan(MODEL, cluster(**changes), PlanRequest(batch))  # type: ignore[arg-type]


def seconds(plan: Plan) -> float:
    return plan.chosen.predicted.step_seconds.mid


def test_more_memory_saves_what_the_larger_device_plans() -> None:
    plan = plan_of(gibibytes=11)
    assert plan.chosen.binding == "memory" and plan.limit.startswith("memory: ")
    more = [one for one in plan.buys if "memory" in one.change]
    assert more and "would fit" in more[0].why
    gibibytes = int(more[-1].change.split()[0])
    grown = plan_of(gibibytes=11 + gibibytes)
    assert seconds(grown) <= more[-1].step_seconds * (1 + 2 * TIE)
    assert 1 - more[-1].step_seconds / seconds(plan) == pytest.approx(more[-1].saves)


def test_a_faster_network_saves_what_the_faster_cluster_plans() -> None:
    plan = plan_of(network=2e9)
    (link,) = [one for one in plan.buys if "between nodes" in one.change]
    assert link.change == "2 GB/s more between nodes"
    assert seconds(plan_of(network=4e9)) <= link.step_seconds * (1 + 2 * TIE)
    assert link.saves == pytest.approx(1 - link.step_seconds / seconds(plan))


def test_more_devices_and_a_larger_batch_save_what_they_plan() -> None:
    plan = plan_of()
    (devices,) = [one for one in plan.buys if one.change.startswith("cluster.devices=")]
    larger = cluster(devices=int(devices.change.split("=")[1].split()[0]))
    assert seconds(make_plan(MODEL, larger, PlanRequest(32))) <= devices.step_seconds * (1 + 2 * TIE)
    for one in plan.buys:
        if one.change.startswith("global_batch=64"):
            assert seconds(plan_of(batch=64)) <= one.step_seconds * (1 + 2 * TIE)
            assert one.saves == pytest.approx(1 - one.step_seconds / 2 / seconds(plan))


def test_only_what_matters_is_listed_the_most_first() -> None:
    saves = [one.saves for one in plan_of(network=2e9).buys]
    assert saves == sorted(saves, reverse=True) and all(saved >= 0.02 for saved in saves)
    alone = make_plan(MODEL, cluster(1, 1, gibibytes=60), PlanRequest(8))
    assert not any("GB/s" in one.change for one in alone.buys), "one device waits for nobody"


def test_idle_stages_are_named_as_the_limit() -> None:
    pins = {"pp": 8, "micro_batch": 4, "schedule": "gpipe"}
    plan = make_plan(MODEL, cluster(gibibytes=80), PlanRequest(8, pins=pins))
    assert plan.limit.startswith("idle stages, 2 micro-batches through 8 stages: ")


def test_runners_up_within_the_margin_are_marked() -> None:
    plan = plan_of()
    _, apart = default_profile().interval("pairs", "cuda")
    for choice in plan.runners_up:
        assert choice.level == (choice.predicted.step_seconds.mid <= apart * seconds(plan))
        assert choice.level == ("cannot be told apart" in choice.why)
    assert any(choice.level for choice in plan.runners_up)


def test_the_changes_are_in_the_json() -> None:
    plan = plan_of(network=2e9)
    assert plan.buys and Plan.from_dict(plan.as_dict()) == plan
    assert replace(plan, buys=()).as_dict()["buys"] == []


def test_fewer_processes_on_the_same_cores_save_what_they_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    small = card(LlamaShape(layers=12, hidden=192, heads=6, kv_heads=6, head_dim=32, ffn=512, vocab=16384), 128)
    request = PlanRequest(8, "fp32")
    slow = replace(machine.cpu_cluster(2), intra=Link("slow", 1e8, 1e-3, topology="host"))
    plan = make_plan(small, slow, request)
    (fewer,) = [one for one in plan.buys if "threads a process" in one.change]
    assert fewer.change == "cluster.devices=1 (2 threads a process)"
    assert machine.cpu_cluster(1).device == slow.in_processes(1).device
    assert seconds(make_plan(small, machine.cpu_cluster(1), request)) == pytest.approx(fewer.step_seconds)
    pinned = make_plan(small, slow, replace(request, pins={"dp": 2}))
    assert not any("threads a process" in one.change for one in pinned.buys)
    many = make_plan(small, replace(machine.cpu_cluster(8), intra=slow.intra), request)
    assert not any("threads a process" in one.change for one in many.buys), "eight processes share two cores"
