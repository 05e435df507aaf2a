"""Seconds of arithmetic: bounds that no device can beat, laws of splitting, and measured products and kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.card import AttentionShape
from meshwright.cluster import named_cluster
from meshwright.errors import InputError
from meshwright.families.decoder import DecoderShape, card
from meshwright.layout import Layout
from meshwright.plan.constants import DATASHEET
from meshwright.plan.cost.gpu import BlockSeconds, Compute, local_elements
from meshwright.plan.rules import FRAMEWORKS

H100 = named_cluster("h100-sxm-80gb", 8).device
A100 = named_cluster("a100-sxm-80gb", 8).device
LAYER = card(DecoderShape(2, 4096, 32, 8, 128, 14336, 32000), 4096).blocks[1]
widths = st.integers(1, 8192)


@given(widths, widths, widths, st.sampled_from(["fp32", "bf16", "fp8"]))
def test_no_product_beats_the_peak_or_the_memory(rows: int, inner: int, columns: int, precision: str) -> None:
    seconds = Compute(H100, precision).product(rows, inner, columns)
    assert seconds >= 2 * rows * inner * columns / H100.flops[precision]
    weight_bytes = inner * columns * {"fp32": 4, "bf16": 2, "fp8": 1}[precision]
    assert seconds >= weight_bytes / H100.memory_bytes_per_second


@given(widths, widths, widths)
def test_more_work_never_takes_much_less_time(rows: int, inner: int, columns: int) -> None:
    """Ragged tiles may make a slightly larger product no slower, but twice the rows are never quicker."""
    compute = Compute(A100, "bf16")
    assert compute.product(2 * rows, inner, columns) >= compute.product(rows, inner, columns) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "tflops"),
    # Azure's AI benchmarking guide: cuBLASLt in fp16 on an A100 of 80 GB.
    [
        (1024, 1024, 1024, 119.4),
        (2048, 2048, 2048, 221.8),
        (4096, 4096, 4096, 228.0),
        (8192, 8192, 8192, 253.7),
        (16384, 16384, 16384, 256.5),
        (6144, 12288, 12288, 250.8),
    ],
)
def test_products_run_as_they_were_measured_to(rows: int, inner: int, columns: int, tflops: float) -> None:
    seconds = Compute(A100, "fp16").product(rows, inner, columns)
    assert 2 * rows * inner * columns / seconds / 1e12 == pytest.approx(tflops, rel=0.2)


def test_small_products_are_far_from_the_peak() -> None:
    compute = Compute(H100, "bf16")

    def share(width: int) -> float:
        return 2 * width**3 / compute.product(width, width, width) / H100.flops["bf16"]

    assert share(8192) > 0.6
    assert share(256) < 0.05


def test_attention_runs_as_it_was_measured_to() -> None:
    """FlashAttention 2 forward on 2 x 8192 tokens (Azure's guide): 180 TFLOP/s on A100, 328 on H100."""
    for device, head_dim, tflops in ((A100, 64, 179.5), (H100, 128, 327.9)):
        shape = AttentionShape(32, 32, head_dim, 8192)
        forward, backward = Compute(device, "bf16").attention(shape, Layout(micro_batch=2))
        assert 2 * shape.flops / forward / 1e12 == pytest.approx(tflops, rel=0.15)
        assert 2.5 * forward <= backward <= 4 * forward


def test_unfused_attention_is_slower_and_a_softmax_that_falls_back_slower_still() -> None:
    shape = AttentionShape(16, 16, 64, 1024)
    unfused = Compute(A100, "fp16", framework=FRAMEWORKS["megatron-deepspeed"])
    fused = Compute(A100, "fp16")
    assert unfused.attention(shape, Layout())[0] > 1.5 * fused.attention(shape, Layout())[0]
    two_heads, four_pairs = Layout(tp=8), Layout(tp=8, micro_batch=2)
    assert unfused.attention(shape, two_heads)[0] > unfused.attention(shape, four_pairs)[0] / 2


def seconds(**changes: object) -> BlockSeconds:
    fields = {"micro_batch": 2, **changes}
    return Compute(H100, "bf16").block(LAYER, Layout(**fields))  # type: ignore[arg-type]


def test_backward_takes_about_twice_the_forward() -> None:
    found = seconds()
    assert 1.9 < found.backward / found.forward < 2.6
    assert 0.3 < found.weight / found.backward < 0.5


def test_recompute_adds_at_most_a_forward() -> None:
    none, selective, full = (seconds(recompute=word).recompute for word in ("none", "selective", "full"))
    assert 0 == none < selective < full <= seconds().forward * (1 + 1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_our_selective_recompute_keeps_attention_and_products(precision: str) -> None:
    """It computes again what is memory-bound."""
    unit, layout = Compute(H100, precision), Layout(micro_batch=2, recompute="selective")
    found = unit.block(LAYER, layout)
    assert found.recompute == pytest.approx(unit.elementwise(LAYER, layout))
    longer = replace(LAYER, attention=AttentionShape(32, 8, 128, 16384))
    assert unit.block(longer, layout).recompute == found.recompute
    megatron = Compute(H100, precision, framework=FRAMEWORKS["megatron-lm"])
    assert megatron.block(LAYER, layout).recompute == pytest.approx(megatron.attention(LAYER.attention, layout)[0])  # type: ignore[arg-type]
    assert 0 < found.host_recompute < found.host_forward


def test_the_loss_is_not_computed_again() -> None:
    head = card(DecoderShape(2, 4096, 32, 8, 128, 14336, 32000), 4096).blocks[-1]
    assert Compute(H100, "bf16").block(head, Layout(recompute="selective")).recompute == 0


def test_tensor_parallel_saves_less_than_its_degree_and_sequence_parallel_more() -> None:
    whole, split = seconds().forward, seconds(tp=4).forward
    assert whole / 4 < seconds(tp=4, sequence_parallel=True).forward < split < whole


def test_fp8_helps_large_products_and_costs_casts() -> None:
    layout = Layout(micro_batch=4)
    bf16, fp8 = (Compute(H100, word, framework=FRAMEWORKS["nemo"]).block(LAYER, layout) for word in ("bf16", "fp8"))
    assert 0.5 < fp8.forward / bf16.forward < 0.95


def test_experts_compute_what_their_tokens_visit_and_the_busiest_rank_decides() -> None:
    shape = DecoderShape(2, 2048, 16, 16, 128, 8192, 32000, experts=8, top_k=2, expert_ffn=1024)
    compute, layout = Compute(H100, "bf16"), Layout(micro_batch=4)
    even = compute.block(card(shape, 2048).blocks[1], layout)
    busy = compute.block(card(replace(shape, imbalance=1.5), 2048).blocks[1], layout)
    more = compute.block(card(replace(shape, top_k=4), 2048).blocks[1], layout)
    assert even.forward < busy.forward < more.forward


def test_context_parallel_divides_the_work() -> None:
    whole, split = seconds(), seconds(cp=4)
    assert whole.forward / 5 < split.forward < whole.forward / 3


def test_the_host_starts_operations() -> None:
    assert Compute(H100, "bf16", framework=FRAMEWORKS["megatron-lm"]).block(LAYER, Layout()).host_forward > 0
    slow = replace(H100, launch_seconds=1.0)
    assert Compute(slow, "bf16").block(LAYER, Layout()).host_forward > 10


def test_local_elements_leave_norms_whole_and_split_experts() -> None:
    norms = 2 * 4096
    whole = LAYER.parameter_elements
    assert local_elements(LAYER.parameters, 1) == whole
    assert local_elements(LAYER.parameters, 4) == (whole - norms) // 4 + norms
    mixture = card(DecoderShape(1, 64, 4, 4, 16, 256, 1000, experts=8, top_k=2, expert_ffn=32), 16).blocks[1]
    experts = 8 * 3 * 64 * 32
    assert local_elements(mixture.parameters, 1, 4) == mixture.parameter_elements - experts + experts // 4


def test_the_optimizer_is_bound_by_memory() -> None:
    c = DATASHEET.constants
    expected = 1e9 * c["cuda.optimizer.bytes"] / (H100.memory_bytes_per_second * c["cuda.memory.share"])
    assert Compute(H100, "bf16").optimizer(1e9) == pytest.approx(expected)
    assert Compute(H100, "bf16").optimizer(1e9, offload=True) > 5 * expected
    scaled = Compute(A100, "fp16", framework=FRAMEWORKS["megatron-lm"]).optimizer(1e9)
    assert scaled > Compute(A100, "bf16", framework=FRAMEWORKS["megatron-lm"]).optimizer(1e9)


def test_a_precision_that_the_device_does_not_have_is_bad_input() -> None:
    with pytest.raises(InputError, match="it has fp32, fp16"):
        Compute(named_cluster("t4").device, "bf16")
