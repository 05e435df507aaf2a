"""Constants are recovered from figures that were computed with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from meshwright.card import AttentionShape, Block
from meshwright.cli.main import main
from meshwright.cluster import Cluster, Device, Link
from meshwright.layout import Layout
from meshwright.plan.calibrate import machine_profile
from meshwright.plan.calibrate.from_machine import (
    EXTRA_ACCUMULATE_BYTES,
    INTERVAL,
    LAYER_OPERATIONS,
    changes,
    disturbances,
)
from meshwright.plan.constants import DATASHEET, Profile, load_profile
from meshwright.plan.cost.cpu import GATHER_BYTES, CpuCompute
from meshwright.plan.cost.network import CommGroup, GlooNetwork

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


def figures(truth: Profile, ranks: float = 1.0, together: float = 1.0) -> dict[str, Any]:
    """The figures of a probe on a machine with the constants `truth`, whose processes get the shares `ranks` and
    `together` of the processors in the two phases."""
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
            sharded = unit.sharding_host + elements * (GATHER_BYTES[word] + EXTRA_ACCUMULATE_BYTES[word]) / unit.copies
            row = {"precision": word, "elements": elements, "forward": plain / 3, "plain": plain}
            again = plain + plain / 3 + c["cpu.host.checkpoint_seconds"]
            busy["layers"].append({**row, "checkpointed": again, "sharded": plain + sharded})
    busy["read_bytes_per_second"] = 3e10 * truth["cpu.product.operand_share"]
    busy["optimizer"] = {"elements": 1 << 23, "seconds": CpuCompute(CORE, "fp32", truth).optimizer(1 << 23)}
    network, links = GlooNetwork(CLUSTER, truth), []
    for size in (8, 1 << 20, 1 << 24):
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            seconds = getattr(network, name)(size, CommGroup(2, 2))
            links.append({"collective": name, "ranks": 2, "bytes": size, "seconds": seconds})
    alone = {"threads": 2, "products": busy["products"], "chains": busy["chains"], "processors": together}
    return {"kind": "cpu", "busy": busy | {"processors": ranks}, "links": links, "together": alone, "seconds": 30.0}


def test_the_constants_come_back() -> None:
    truth = DATASHEET.changed(OTHER)
    found = machine_profile(figures(truth), CLUSTER, DATASHEET, "here")
    for name in OTHER:
        assert found[name] == pytest.approx(truth[name], rel=0.15), name
    assert found["cuda.product.share"] == DATASHEET["cuda.product.share"]
    low, high = found.interval("cpu", "meshwright", "node")
    assert 0.5 < low < 1 < high < 2


def test_changes_are_listed_largest_first() -> None:
    found = machine_profile(figures(DATASHEET.changed({"cpu.host.share": 3.0})), CLUSTER, DATASHEET, "here")
    by_name = {change.constant: change for change in changes(DATASHEET, found)}
    assert by_name["cpu.host.share"].after == pytest.approx(3.0)
    sizes = [abs(math.log(change.after / change.before)) for change in changes(DATASHEET, found)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_profile_is_read_back_from_its_file(tmp_path: Any) -> None:
    found = machine_profile(figures(DATASHEET.changed(OTHER)), CLUSTER, DATASHEET, "here")
    found.save(tmp_path / "here.toml")
    again = load_profile(tmp_path / "here.toml")
    assert again.name == "here" and "measured on this machine" in again.assumed[0]
    for name in OTHER:
        assert again[name] == pytest.approx(found[name], rel=1e-4)


THREADS = ("cpu.threads.product_share", "cpu.threads.memory_share")


def test_what_threads_add_is_measured_on_a_quiet_machine_alone() -> None:
    """The figures say that a second thread adds nothing."""
    start = DATASHEET.changed(dict.fromkeys(THREADS, 0.83))
    quiet = machine_profile(figures(DATASHEET, 0.93, 0.91), CLUSTER, start, "here")
    assert all(quiet[name] == pytest.approx(0.83 * 0.02 / DATASHEET[name]) for name in THREADS)
    assert len(quiet.assumed) == 1 and disturbances(figures(DATASHEET, 0.93, 0.91)) == ()
    raw = figures(DATASHEET, 1.0, 0.58)
    loud = machine_profile(raw, CLUSTER, start, "here")
    assert all(loud[name] == 0.83 for name in THREADS)
    (words,) = disturbances(raw)
    assert "got 58 % of the processors; what threads add is as before; measure again" in words
    assert words in loud.assumed and loud.interval("cpu") == INTERVAL
    assert loud["cpu.optimizer.share"] == quiet["cpu.optimizer.share"]


def test_ranks_that_did_not_get_their_cores_widen_the_interval_downwards() -> None:
    raw = figures(DATASHEET, 0.6, 1.0)
    found = machine_profile(raw, CLUSTER, DATASHEET, "here")
    assert found.interval("cpu") == pytest.approx((0.6 * INTERVAL[0], INTERVAL[1]))
    (words,) = disturbances(raw)
    assert "its processes got 60 % of the processors" in words and words in found.assumed
    both = figures(DATASHEET, 0.6, 0.6)
    assert len(disturbances(both)) == 2


def test_one_core_and_gpus_have_no_second_phase_to_disturb() -> None:
    raw = figures(DATASHEET) | {"together": None}
    del raw["busy"]["processors"]
    assert disturbances(raw) == ()
    assert machine_profile(raw, CLUSTER, DATASHEET, "here")[THREADS[0]] == DATASHEET[THREADS[0]]


def test_a_figure_out_of_bounds_is_set_to_the_bound(tmp_path: Path) -> None:
    raw, start = figures(DATASHEET), DATASHEET.changed({"cpu.host.checkpoint_seconds": 5e-6})
    for row in raw["busy"]["layers"]:
        row["checkpointed"] = row["plain"]
    found = machine_profile(raw, CLUSTER, start, "here")
    found.save(tmp_path / "here.toml")
    assert load_profile(tmp_path / "here.toml")["cpu.host.checkpoint_seconds"] == 1e-6


def test_the_command_says_that_the_machine_was_busy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = figures(DATASHEET, 1.0, 0.58)
    monkeypatch.setattr("meshwright.probe.machine", lambda seconds: raw | {"seconds": seconds})
    assert main(["calibrate", "machine", "--seconds", "7", "--out", str(tmp_path / "here.toml"), "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["busy"] == list(disturbances(raw)) == caplog.messages
    assert account["seconds"] == 7 and account["raw"]["together"]["processors"] == 0.58
    comment = (tmp_path / "here.toml").read_text().rpartition("# Measured (JSON): ")[2]
    assert json.loads(comment) == account["raw"]
    assert load_profile(tmp_path / "here.toml")["cpu.threads.product_share"] == pytest.approx(1.0338)
