"""The CPU's time model: its parts, and its dependence on size, threads and layout."""

from __future__ import annotations

import dataclasses
import math

import pytest

from meshwright.card import AttentionShape, Block, Parameter, Product
from meshwright.cluster import Cluster, Device, Link
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.constants import DATASHEET
from meshwright.plan.cost import Estimator
from meshwright.plan.cost.cpu import CHAIN_BYTES, CpuCompute, operations
from meshwright.plan.cost.network import CommGroup, GlooNetwork

MODEL = card(LlamaShape(layers=4, hidden=256, heads=8, kv_heads=8, head_dim=32, ffn=704, vocab=2048), seq_len=128)
CORE = Device("core", "cpu", 10**10, {"fp32": 1e11, "bf16": 4e11}, 3e10, 6e-6, units=1)
LINK = Link("gloo", 1e9, 0.35e-3, topology="host")
PROFILE = DATASHEET
C = PROFILE.constants
LAYER = Block(
    "0",
    "layer",
    (Parameter("w", (256, 512), ("ffn", "embed")),),
    products=(Product("up", 64, 512, 256, "ffn"),),
    attention=AttentionShape(8, 8, 32, 64),
    output_elements=64 * 512,
    elementwise_elements=64 * 512 * 8,
)


def compute(precision: str = "fp32", device: Device = CORE) -> CpuCompute:
    return CpuCompute(device, precision, PROFILE)


def test_a_product_is_arithmetic_memory_and_a_start() -> None:
    expected = (
        2 * 64 * 512 * 256 / (1e11 * C["cpu.product.fp32.share"])
        + (64 * 512 + 512 * 256 + 64 * 256) * 4 / (3e10 * C["cpu.product.operand_share"])
        + C["cpu.product.start_seconds"]
    )
    assert compute().product(64, 512, 256) == pytest.approx(expected)
    forward, backward, weight = compute().products(LAYER, Layout())
    assert forward == pytest.approx(expected)
    assert backward == pytest.approx(expected + weight)


def test_a_block_adds_up_its_parts() -> None:
    unit, layout = compute(), Layout(micro_batch=3)
    seconds = unit.block(LAYER, layout)
    products = unit.products(LAYER, layout)
    attention = unit.attention(LAYER.attention, layout)  # type: ignore[arg-type]
    moved, sharding = unit.elementwise(LAYER, layout), unit.sharding(LAYER, layout)
    assert seconds.forward == pytest.approx(products[0] + attention[0] + moved + sharding[0])
    assert seconds.backward == pytest.approx(
        products[1] + attention[1] + unit.elementwise_backward(LAYER, layout) + sharding[1]
    )
    assert seconds.host_forward == pytest.approx(operations(LAYER, "fp32") * 6e-6 * C["cpu.host.share"])


def test_recomputing_all_stops_before_the_last_product_and_selective_leaves_every_product_out() -> None:
    unit = compute()
    layer = dataclasses.replace(LAYER, products=(*LAYER.products, Product("down", 64, 256, 512, "ffn")))
    plain = unit.block(layer, Layout(micro_batch=4))
    full = unit.block(layer, Layout(micro_batch=4, recompute="full"))
    some = unit.block(layer, Layout(micro_batch=4, recompute="selective"))
    assert plain.recompute == 0
    gathered, last = unit.sharding(layer, Layout(micro_batch=4))[0], unit.product(4 * 64, 256, 512)
    assert full.recompute == pytest.approx(plain.forward - gathered - last)
    assert some.recompute == pytest.approx(unit.elementwise(layer, Layout(micro_batch=4)))
    products, blocked = compute("bf16"), compute("bf16").block(layer, Layout(micro_batch=4, recompute="selective"))
    again = products.attention(layer.attention, Layout(micro_batch=4))[0]  # type: ignore[arg-type]
    assert blocked.recompute == pytest.approx(again + products.elementwise(layer, Layout(micro_batch=4)))
    assert some.host_recompute > full.host_recompute > 0


def test_threads_share_what_one_device_counts_as_whole() -> None:
    two = dataclasses.replace(CORE, flops={"fp32": 2e11, "bf16": 8e11}, memory_bytes_per_second=6e10, units=2)
    one, both = compute().product(4096, 1024, 1024), compute(device=two).product(4096, 1024, 1024)
    assert 1 < one / both < 2


def test_chains_slow_down_as_tensors_outgrow_the_caches() -> None:
    def each(size_bytes: int) -> float:
        elements = size_bytes // 4
        block = Block("x", "layer", (), output_elements=elements, elementwise_elements=elements)
        return compute().elementwise(block, Layout()) / elements

    small, large = CHAIN_BYTES
    times = [each(size) for size in (small // 4, small, int(math.sqrt(small * large)), large, 4 * large)]
    assert times[0] == pytest.approx(times[1]) and times[3] == pytest.approx(times[4])
    assert times[1] < times[2] < times[3]
    assert times[2] == pytest.approx(math.sqrt(times[1] * times[3]), rel=1e-3)


def test_only_a_head_has_a_loss() -> None:
    head = Block("head", "head", (), (Product("out", 64, 512, 1000, "vocab"),), output_elements=64000)
    assert compute().loss(LAYER, Layout()) == 0
    assert compute().loss(head, Layout(micro_batch=2)) == pytest.approx(2 * 64000 * C["cpu.loss.fp32.small_seconds"])
    assert compute().loss(head, Layout(tp=2)) < compute().loss(head, Layout())


def test_fsdp_gathers_once_more_where_weights_are_freed() -> None:
    unit = compute()
    replicated, sharded = (unit.sharding(LAYER, layout) for layout in (Layout(dp=2), Layout(dp=2, shard=2)))
    piped = unit.sharding(LAYER, Layout(pp=2))
    assert sharded[0] == pytest.approx(replicated[0]) and sharded[1] > replicated[1]
    assert piped[0] < replicated[0]  # gathered once per step, which `step` counts


@pytest.mark.parametrize(("name", "times"), [("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)])
def test_gloo_is_latency_and_bytes_on_the_wire(name: str, times: int) -> None:
    cluster = Cluster(CORE, 2, 2, LINK, LINK)
    network = GlooNetwork(cluster, PROFILE)
    seconds = getattr(network, name)(8e6, CommGroup(2, 2))
    latency = 0.35e-3 * C[f"cpu.net.{name}.latency"]
    assert seconds == pytest.approx(latency + times * 4e6 / (1e9 * C[f"cpu.net.{name}.share"]))
    assert getattr(network, name)(8e6, CommGroup(1, 1)) == 0


def test_a_pipeline_and_a_single_stage_share_no_cache() -> None:
    cluster = Cluster(CORE, 2, 2, LINK, LINK)
    first = Estimator(Workload(MODEL, cluster, 8, "fp32"), PROFILE)
    alone = first.estimate(Layout(micro_batch=2))
    after = Estimator(Workload(MODEL, cluster, 8, "fp32"), PROFILE)
    after.estimate(Layout(pp=2, micro_batch=2))
    assert after.estimate(Layout(micro_batch=2)).step_seconds == pytest.approx(alone.step_seconds)
