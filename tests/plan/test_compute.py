"""Seconds of arithmetic: bounds that no device can beat, and laws of splitting."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.card import Product
from meshwright.cluster import named_cluster
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan.compute import block_seconds, local_elements, optimizer_seconds, product_seconds

H100 = named_cluster("h100-sxm-80gb", 8).device
LAYER = card(LlamaShape(2, 4096, 32, 8, 128, 14336, 32000), 4096).blocks[1]
widths = st.integers(1, 8192)


@given(widths, widths, widths, st.sampled_from(["fp32", "bf16"]))
def test_no_product_beats_the_peak_or_the_memory(rows: int, inner: int, columns: int, precision: str) -> None:
    product = Product("p", rows, inner, columns)
    seconds = product_seconds(product, H100, 1, 1, precision)
    assert seconds >= product.flops / H100.flops[precision]
    weight_bytes = inner * columns * (2 if precision == "bf16" else 4)
    assert seconds >= weight_bytes / H100.memory_bytes_per_second


def test_large_products_run_near_the_peak_and_small_ones_do_not() -> None:
    def share(width: int) -> float:
        product = Product("p", width, width, width)
        return product.flops / product_seconds(product, H100, 1, 1, "bf16") / H100.flops["bf16"]

    assert 0.6 < share(8192) < 1.0
    assert share(256) < 0.05


def times(**changes: object) -> tuple[float, float]:
    settings = {"tp": 1, "sequence_parallel": False, "micro_batch": 2, "precision": "bf16", "recompute": "none"}
    found = block_seconds(LAYER, H100, **{**settings, **changes})  # type: ignore[arg-type]
    return found.forward, found.backward + found.recompute


def test_backward_takes_about_twice_the_forward() -> None:
    forward, backward = times()
    assert 1.9 < backward / forward < 2.6


def test_recompute_adds_at_most_a_forward() -> None:
    forward, plain = times()
    assert plain < times(recompute="selective")[1] < times(recompute="full")[1] <= plain + forward * (1 + 1e-9)


def test_tensor_parallel_saves_less_than_its_degree_and_sequence_parallel_more() -> None:
    whole, split = times()[0], times(tp=4)[0]
    assert whole / 4 < times(tp=4, sequence_parallel=True)[0] < split < whole


def test_a_gpu_waits_for_its_host_when_the_work_is_small() -> None:
    slow = replace(H100, launch_seconds=1.0)
    settings = {"tp": 1, "sequence_parallel": False, "micro_batch": 1, "precision": "bf16", "recompute": "none"}
    assert block_seconds(LAYER, slow, **settings).forward > 10  # type: ignore[arg-type]


def test_local_elements_leave_norms_whole() -> None:
    norms = 2 * 4096
    whole = LAYER.parameter_elements
    assert local_elements(LAYER.parameters, 1) == whole
    assert local_elements(LAYER.parameters, 4) == (whole - norms) // 4 + norms


def test_the_optimizer_is_bound_by_memory() -> None:
    assert optimizer_seconds(1e9, H100) == pytest.approx(28e9 / H100.memory_bytes_per_second / 0.7)
