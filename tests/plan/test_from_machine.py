"""Constants are read back out of figures that were made with them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from meshwright.card import AttentionShape, Block
from meshwright.cluster import Cluster, Device, Link
from meshwright.layout import Layout
from meshwright.plan.cpu import GATHER_BYTES, CpuCompute, GlooNetwork
from meshwright.plan.from_machine import LAYER_OPERATIONS, MORE_ADDING, changes, machine_profile
from meshwright.plan.network import Group
from meshwright.plan.profile import DATASHEET, Profile, load_profile

CORE = Device("core", "cpu", 10**10, {"fp32": 1e11, "bf16": 4e11}, 3e10, 6e-6, units=1)
CLUSTER = Cluster(CORE, 2, 2, *(Link("gloo", 1e9, 0.35e-3, topology="host"),) * 2)
PRODUCTS = ((64, 512, 512), (256, 256, 1024), (1024, 512, 512), (2048, 384, 1024))
OTHER = {
    "cpu.product.fp32.share": 0.7,
    "cpu.product.fp32.weight_share": 0.6,
    "cpu.product.bf16.share": 0.9,
    "cpu.product.bf16.weight_share": 0.5,
    "cpu.product.operand_share": 0.6,
    "cpu.product.start_seconds": 2e-5,
    "cpu.attention.bf16.share": 0.4,
    "cpu.attention.bf16.score_seconds": 3e-9,
    "cpu.attention.fp32.score_backward_seconds": 5e-10,
    "cpu.elementwise.bf16.large_share": 0.11,
    "cpu.loss.fp32.large_seconds": 5e-9,
    "cpu.optimizer.share": 0.8,
    "cpu.copy.share": 0.33,
    "cpu.host.share": 0.5,
    "cpu.host.checkpoint_seconds": 2e-3,
    "cpu.net.all_reduce.share": 0.9,
    "cpu.net.reduce_scatter.latency": 3.0,
}


def figures(truth: Profile) -> dict[str, Any]:
    """What a probe would find on a machine whose constants are `truth`."""
    busy: dict[str, Any] = {key: [] for key in ("products", "attention", "chains", "losses", "layers")}
    for word in ("fp32", "bf16"):
        unit, c = CpuCompute(CORE, word, truth), truth.constants
        for rows, inner, columns in PRODUCTS:
            flops = 2 * rows * inner * columns / CORE.flops[word]  # with operands in the caches
            through, weight = (
                flops / c[f"cpu.product.{word}.{end}share"] + c["cpu.product.start_seconds"] for end in ("", "weight_")
            )
            size = {"precision": word, "rows": rows, "inner": inner, "columns": columns}
            busy["products"].append({**size, "forward": through, "input_gradient": through, "weight_gradient": weight})
        for batch, length, heads, width in ((4, 128, 4, 32), (2, 256, 8, 64), (1, 1024, 4, 64)):
            ahead, back = unit.attention(AttentionShape(heads, heads, width, length), Layout(micro_batch=batch))
            size = {"precision": word, "batch": batch, "length": length, "heads": heads, "width": width}
            busy["attention"].append({**size, "forward": ahead, "backward": back})
        for size_bytes in (1 << 20, 1 << 23):
            elements = size_bytes // unit.bytes
            block = Block("x", "layer", (), output_elements=elements, elementwise_elements=3 * elements)
            once = unit.elementwise(block, Layout())
            busy["chains"].append({"precision": word, "moved": 3 * elements, "forward": once, "backward": 2 * once})
        for logits, size in ((1 << 20, "small"), (1 << 22, "large")):
            seconds = logits * c[f"cpu.loss.{word}.{size}_seconds"]
            busy["losses"].append({"precision": word, "logits": logits, "seconds": seconds})
        plain = 3 * LAYER_OPERATIONS[word] * unit.launch
        for elements in (0, 1 << 22):
            sharded = unit.sharding_host + elements * (GATHER_BYTES[word] + MORE_ADDING[word]) / unit.copies
            row = {"precision": word, "elements": elements, "forward": plain / 3, "plain": plain}
            again = plain + plain / 3 + c["cpu.host.checkpoint_seconds"]
            busy["layers"].append({**row, "checkpointed": again, "sharded": plain + sharded})
    busy["read_bytes_per_second"] = 3e10 * truth["cpu.product.operand_share"]
    busy["optimizer"] = {"elements": 1 << 23, "seconds": CpuCompute(CORE, "fp32", truth).optimizer(1 << 23)}
    network, links = GlooNetwork(CLUSTER, truth), []
    for size in (8, 1 << 20, 1 << 24):
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            seconds = getattr(network, name)(size, Group(2, 2))
            links.append({"collective": name, "ranks": 2, "bytes": size, "seconds": seconds})
    together = {"threads": 2, "products": busy["products"], "chains": busy["chains"]}
    return {"kind": "cpu", "busy": busy, "links": links, "together": together, "seconds": 30.0}


def test_the_constants_come_back() -> None:
    truth = DATASHEET.changed(OTHER)
    found = machine_profile(figures(truth), CLUSTER, DATASHEET, "here")
    for name in OTHER:
        assert found[name] == pytest.approx(truth[name], rel=0.15), name
    assert found["cuda.product.share"] == DATASHEET["cuda.product.share"]
    low, high = found.interval("cpu", "meshwright", "node")
    assert 0.5 < low < 1 < high < 2


def test_what_changed_is_said_largest_first() -> None:
    found = machine_profile(figures(DATASHEET.changed({"cpu.host.share": 3.0})), CLUSTER, DATASHEET, "here")
    said = {change.constant: change for change in changes(DATASHEET, found)}
    assert said["cpu.host.share"].after == pytest.approx(3.0)
    sizes = [abs(math.log(change.after / change.before)) for change in changes(DATASHEET, found)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_profile_is_read_back_from_its_file(tmp_path: Any) -> None:
    found = machine_profile(figures(DATASHEET.changed(OTHER)), CLUSTER, DATASHEET, "here")
    found.save(tmp_path / "here.toml")
    again = load_profile(tmp_path / "here.toml")
    assert again.name == "here" and "measured on this machine" in again.assumed[0]
    for name in OTHER:
        assert again[name] == pytest.approx(found[name], rel=1e-4)
