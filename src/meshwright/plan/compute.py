"""Seconds that a block's arithmetic takes on one device: a roofline with efficiency by size, and the cost of starting.

A product runs at the peak times an efficiency that grows with its size, or as fast as its operands can be read.
Memory-bound operations run at a share of the memory's speed. On a GPU a block takes the larger of device time and the
host's time to start its operations; on a CPU host and device are the same core, so both are paid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshwright.card import AttentionShape, Block, Parameter, Product
from meshwright.cluster import Device
from meshwright.layout import AXIS_RULES

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, by kind of device. Measured on one machine of each kind, not fitted."""

    product: Mapping[str, float]  # of peak flops, for large products, by precision
    ramp_seconds: float  # work at peak that a product needs to reach half of that
    attention: float  # of fp32 peak on a CPU, of the compute precision's on a GPU
    memory: float  # of memory speed, for chains of small operations in eager mode
    optimizer: float  # of memory speed, for the fused update


EFFICIENCY = {
    "cpu": Efficiency({"fp32": 1.0, "bf16": 1.05}, 10e-6, 0.5, 0.22, 0.5),
    "cuda": Efficiency({"fp32": 0.75, "bf16": 0.75}, 4e-6, 0.45, 0.65, 0.7),
}
#: AdamW reads parameter, gradient and two moments and writes three of them, in fp32.
OPTIMIZER_BYTES_PER_PARAMETER = 28
#: Attention's backward does five products where its forward does two (Dao, FlashAttention-2, 2023).
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class BlockSeconds:
    """Arithmetic of one micro-batch through one block; `recompute` is what backward adds by recomputing."""

    forward: float
    backward: float
    recompute: float


def local_elements(parameters: Iterable[Parameter], tp: int) -> int:
    """Elements of the parameters that one of `tp` tensor-parallel ranks holds."""
    return sum(p.elements // tp if tp > 1 and any(axis_split(a) for a in p.axes) else p.elements for p in parameters)


def axis_split(axis: str | None) -> bool:
    """Whether tensor parallelism splits this logical axis."""
    return axis is not None and AXIS_RULES.get(axis) == "tp"


def block_seconds(
    block: Block, device: Device, *, tp: int, sequence_parallel: bool, micro_batch: int, precision: str, recompute: str
) -> BlockSeconds:
    """Forward and backward seconds of `micro_batch` samples, on one of `tp` ranks."""
    forward = backward = 0.0
    for product in block.products:
        seconds = product_seconds(product, device, tp, micro_batch, precision)
        forward, backward = forward + seconds, backward + 2 * seconds
    if block.attention:
        seconds = attention_seconds(block.attention, device, tp, micro_batch, precision)
        forward, backward = forward + seconds, backward + ATTENTION_BACKWARD * seconds
    moved = block.elementwise_elements * micro_batch * BYTES[precision] * _kept_share(block, tp, sequence_parallel)
    elementwise = moved / (device.memory_bytes_per_second * EFFICIENCY[device.kind].memory)
    again = {"none": 0.0, "selective": 0.5 * elementwise, "full": forward + elementwise}[recompute]
    starts = _operations(block) * device.launch_seconds
    starts_again = {"none": 0.0, "selective": 0.3 * starts, "full": starts}[recompute]
    return BlockSeconds(
        forward=_with_starts(device, forward + elementwise, starts),
        backward=_with_starts(device, backward + 2 * elementwise, 2 * starts),
        recompute=_with_starts(device, again, starts_again),
    )


def product_seconds(product: Product, device: Device, tp: int, micro_batch: int, precision: str) -> float:
    """One matrix product of `micro_batch` samples: the larger of arithmetic and reading its operands."""
    ways = tp if axis_split(product.split) else 1
    flops = product.flops * micro_batch / ways
    peak = device.flops[precision]
    shares = EFFICIENCY[device.kind]
    arithmetic = flops / (peak * shares.product[precision]) + (shares.ramp_seconds if flops else 0.0)
    elements = (product.rows * micro_batch * (product.inner + product.columns) + product.inner * product.columns) / ways
    return max(arithmetic, elements * BYTES[precision] / device.memory_bytes_per_second)


def attention_seconds(shape: AttentionShape, device: Device, tp: int, micro_batch: int, precision: str) -> float:
    """Forward of fused attention."""
    peak = device.flops["fp32" if device.kind == "cpu" else precision]
    shares = EFFICIENCY[device.kind]
    return shape.flops * micro_batch / tp / (peak * shares.attention) + shares.ramp_seconds


def optimizer_seconds(elements: float, device: Device) -> float:
    """One AdamW update of `elements` parameters held by the rank."""
    speed = device.memory_bytes_per_second * EFFICIENCY[device.kind].optimizer
    return elements * OPTIMIZER_BYTES_PER_PARAMETER / speed


def _kept_share(block: Block, tp: int, sequence_parallel: bool) -> float:
    """Share of a block's memory-bound work left to one of `tp` ranks, as its saved activations are split."""
    whole = sum(saved.elements for saved in block.saved)
    if tp == 1:
        return 1.0
    if not whole:
        return 1 / tp if sequence_parallel else 1.0
    split = sum(s.elements for s in block.saved if s.split == "tp" or (s.split == "sp" and sequence_parallel))
    return (whole - split + split / tp) / whole


def _operations(block: Block) -> int:
    """Operations that eager mode starts in a forward pass: a count by kind of work, good to a third."""
    return 3 * len(block.products) + (20 if block.attention else 0) + 6


def _with_starts(device: Device, work: float, starts: float) -> float:
    return work + starts if device.kind == "cpu" else max(work, starts)
