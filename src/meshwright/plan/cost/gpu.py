"""Seconds of a block's arithmetic on one device: a roofline with efficiency by size, and the cost of starting kernels.

A product runs at the measured ceiling, reduced by its inner size and by how its tiles fill the device's cores in waves,
or as fast as its operands can be read. Memory-bound operations run at a share of the memory's speed, and no kernel is
shorter than its own start. The host's time to start operations is counted apart: a stage takes about the larger of host
and device on a GPU, and their sum on a CPU, where both are the same core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from meshwright.card import AttentionShape, Block, Parameter, Product
from meshwright.cluster import Device
from meshwright.errors import InputError, Problem
from meshwright.layout import AXIS_RULES, Layout
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.cost.block_memory import ELEMENT_BYTES, local_size
from meshwright.plan.rules import FRAMEWORKS, Framework

#: Bytes of one operand of a product by compute precision: products read fp8 and fp4, activations stay in bf16.
OPERAND_BYTES: Mapping[str, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "fp4": 0.5}
#: Forward speed of fused attention as a share of the dense bf16 peak, long sequences, heads of 128, causal flops
#: counted once. "flash" is FlashAttention 2 (Dao 2023; Azure's benchmarking guide measured 0.58 and 0.33), "best" the
#: device's own: FlashAttention 3 (Shah et al. 2024) or cuDNN's on Hopper, cuDNN's on Blackwell (its release notes).
FLASH_SHARE: Mapping[str, Mapping[str, float]] = {
    "flash": {"sm80": 0.62, "sm90": 0.36, "sm100": 0.30, "sm103": 0.30, "": 0.35},
    "best": {"sm80": 0.65, "sm90": 0.60, "sm100": 0.55, "sm103": 0.55, "": 0.40},
}
#: (width of a head up to, speed relative to heads of 128)
FLASH_HEADS = ((64, 0.90), (128, 1.0), (256, 0.85), (1 << 30, 0.5))
#: Tiles of the libraries' matrix products, and the share of the full rate that each can reach.
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.97), (128, 64, 0.88), (64, 128, 0.88), (64, 64, 0.75))
NAMES = tuple(name for name in DATASHEET.constants if name.startswith("cuda."))
#: Megatron's fused softmax needs whole groups of this many (sample, head) pairs; else it uses plain operations.
SOFTMAX_GROUP, SOFTMAX_PASSES, SOFTMAX_OPERATIONS = 4, 8.0, 10


@dataclass(frozen=True)
class BlockSeconds:
    """One micro-batch through one block: seconds of the device and of the host. `weight` is the part of the backward
    that computes weight gradients; `recompute` and `host_recompute` are added to the backward by recomputing."""

    forward: float
    backward: float
    recompute: float
    weight: float
    host_forward: float
    host_backward: float
    host_recompute: float


def local_elements(parameters: Iterable[Parameter], tp: int, ep: int = 1) -> int:
    """Elements of the parameters that one of `tp` tensor-parallel and `ep` expert-parallel ranks holds."""
    return sum(local_size(parameter, tp, ep, 1) for parameter in parameters)


def axis_split(axis: str | None) -> bool:
    """Whether tensor parallelism splits this logical axis."""
    return axis is not None and AXIS_RULES.get(axis) == "tp"


class Compute:
    """Seconds on one kind of device at one precision, under one framework, by a profile's constants."""

    def __init__(
        self,
        device: Device,
        precision: str,
        profile: Profile = DATASHEET,
        framework: Framework = FRAMEWORKS["meshwright"],
    ) -> None:
        self.device, self.precision, self.framework = device, precision, framework
        self.c = {name.removeprefix("cuda."): profile.constants[name] for name in NAMES}
        self.plain = "bf16" if precision in ("fp8", "fp4") else precision
        self.sustained = self.c.get(f"product.sustained.{device.generation}", 1.0)
        self.rates = {word: self._rate(word) for word in {precision, self.plain}}
        self.memory = device.memory_bytes_per_second * self.c["memory.share"]
        self.launch = device.launch_seconds * self.c["host.share"]
        self.waves, self.inner = self.c["product.waves"], self.c["product.inner"]
        self.start = self.c["product.start_seconds"]
        self._parts: dict[tuple[object, ...], tuple[Block, tuple[float, ...]]] = {}

    def _rate(self, precision: str) -> float:
        """Flops a second of large products. Raises InputError where the device does not have the precision."""
        if not self.device.flops.get(precision):
            have = "it has " + ", ".join(self.device.flops)
            raise InputError(Problem("train.precision", f"{self.device.name} has no known speed at {precision}", have))
        real = self.device.real_flops.get(precision, 0.0)
        ceiling = real or self.device.flops[precision] * self.c["product.unmeasured"]
        return ceiling * self.c["product.share"] * self.sustained

    def product(self, rows: float, inner: float, columns: float, groups: int = 1, *, plain: bool = False) -> float:
        """One product, or `groups` of them side by side: the larger of arithmetic and moving operands. `plain` products
        stay in bf16 where the others are in fp8."""
        if rows <= 0 or inner <= 0 or columns <= 0:
            return 0.0
        precision = self.plain if plain else self.precision
        used = inner / (inner + self.inner)
        if self.device.units:
            used *= _tiles_used(rows / groups, columns, groups, self.device.units) ** self.waves
        arithmetic = 2.0 * rows * inner * columns / (self.rates[precision] * used) + self.start
        operands = (rows * inner + groups * inner * columns) * OPERAND_BYTES[precision]
        moved = operands + rows * columns * ELEMENT_BYTES[precision]
        return max(arithmetic, moved / self.memory)

    def products(self, block: Block, layout: Layout) -> tuple[float, float, float]:
        """Seconds of a block's products: forward, backward, and the part of the backward for weight gradients."""
        forward = backward = weight = 0.0
        for product in block.products:
            rows, inner, columns = split_product(product, layout)
            plain = product.split == "vocab" or self.precision == self.plain
            groups = max(1, product.groups // layout.ep)
            imbalance = block.experts.imbalance if block.experts and product.groups > 1 else 1.0
            rows *= imbalance
            share = min(1.0, self.c["product.wide"]) if product.split == "vocab" and layout.tp == 1 else 1.0
            ahead = self.product(rows, inner, columns, groups, plain=plain) / share
            through = self.product(rows, columns, inner, groups, plain=plain) / share
            of_weight = self.product(inner, rows / groups, columns * groups, 1, plain=plain) / share
            forward, backward, weight = forward + ahead, backward + through + of_weight, weight + of_weight
            if not plain:
                forward += self.c["cast.bytes"] * rows * inner / self.memory
                backward += self.c["cast.bytes"] * rows * columns / self.memory
        return forward, backward, weight

    def attention(self, shape: AttentionShape, layout: Layout) -> tuple[float, float]:
        """Seconds of attention's core, forward and backward."""
        samples, c = layout.micro_batch, self.c
        if self.framework.attention == "unfused":
            scores = shape.heads / layout.tp * samples * shape.seq_len * shape.seq_len / layout.cp
            rate = self.rates[self.plain] * c["attention.unfused"]
            passes = c["attention.passes"] + (SOFTMAX_PASSES if self._falls_back(shape, layout) else 0.0)
            products = 2 * scores * (shape.head_dim + (shape.value_dim or shape.head_dim)) / rate
            moved = passes * scores * ELEMENT_BYTES[self.precision] / self.memory
            return products + moved, 2 * products + 1.5 * moved
        shares = FLASH_SHARE[self.framework.attention]
        share = shares.get(self.device.generation, shares[""])
        share *= next((factor for width, factor in FLASH_HEADS if shape.head_dim <= width), FLASH_HEADS[-1][1])
        length = shape.seq_len / layout.cp
        peak = self.device.flops.get("bf16") or self.device.flops.get("fp16") or self.device.flops["fp32"]
        if self.precision == "fp32":
            peak = self.device.flops["fp32"]
        rate = peak * share * self.sustained * c["attention.share"] * length / (length + c["attention.half_seq"])
        flops = shape.flops * samples / (layout.tp * layout.cp)
        ahead = flops / rate + self.start
        return ahead, c["attention.backward"] * ahead

    def _falls_back(self, shape: AttentionShape, layout: Layout) -> bool:
        return bool(shape.heads // layout.tp * layout.micro_batch % SOFTMAX_GROUP)

    def elementwise(self, block: Block, layout: Layout) -> float:
        """Seconds of a block's memory-bound operations, forward."""
        moved_bytes = block.elementwise_elements * layout.micro_batch / layout.cp * ELEMENT_BYTES[self.precision]
        moved_bytes *= elementwise_share(block, layout, self.device.kind, self.precision)
        fused = self.framework.fused
        if block.kind == "head":
            if self.framework.fused_cross_entropy or fused == "compiled":
                moved_bytes *= self.c["memory.cross_entropy"]
        elif fused != "none":
            moved_bytes *= self.c[f"memory.{fused}"]
        kernels = 6 + (14 if block.attention else 0)
        return moved_bytes / self.memory + kernels * FUSED_STARTS[fused] * self.c["kernel_seconds"]

    def block(self, block: Block, layout: Layout) -> BlockSeconds:
        """One micro-batch through a block on one rank, without what it waits for from others."""
        forward, backward, weight, ahead, back, elementwise, starts = self._part_seconds(block, layout)
        again, share = self._recompute_seconds(block, layout, forward, ahead, elementwise)
        return BlockSeconds(
            forward=forward + ahead + elementwise,
            backward=backward + back + 2 * elementwise,
            recompute=again,
            weight=weight,
            host_forward=starts,
            host_backward=starts * self.c["host.backward"],
            host_recompute=starts * share,
        )

    def _part_seconds(self, block: Block, layout: Layout) -> tuple[float, ...]:
        """The seconds of a block that do not depend on recompute or sharding: products forward, backward and weight
        gradients, attention forward and backward, memory-bound operations, the host's starts."""
        key = (id(block), *split_key(layout))
        entry = self._parts.get(key)
        if entry is None:
            attention = self.attention(block.attention, layout) if block.attention else (0.0, 0.0)
            starts = operations(block, self.framework) * self.launch
            if block.attention and self.framework.attention == "unfused" and self._falls_back(block.attention, layout):
                starts += SOFTMAX_OPERATIONS * self.launch
            parts = (*self.products(block, layout), *attention, self.elementwise(block, layout), starts)
            entry = self._parts[key] = (block, parts)  # holds the block, so that the id in its key is not reused
        return entry[1]

    def _recompute_seconds(
        self, block: Block, layout: Layout, products: float, attention: float, elementwise: float
    ) -> tuple[float, float]:
        """Device seconds that recompute adds to the backward, and the share of the forward's starts it repeats."""
        if layout.recompute == "none" or block.kind in self.framework.never_recomputed:
            return 0.0, 0.0
        whole = products + attention + elementwise
        if layout.recompute == "full":
            share = min(1.0, self.c["recompute.share"])
            return whole * share, share
        return {
            "attention": (attention, 0.1),
            "block": (whole / 2, 0.5),
            "operations": (products / 2 + elementwise, 0.7),
            # Of the head's memory-bound operations nearly all are the loss, which is not recomputed.
            "others": (0.0 if block.kind == "head" else elementwise, 0.7),
        }[self.framework.selective]

    def optimizer(self, elements: float, *, offload: bool = False) -> float:
        """One AdamW update of the rank's `elements` parameters, with the passes of the norm and the overflow check."""
        c = self.c
        each = c["optimizer.bytes"]
        if self.framework.loss_scaling and self.precision == "fp16":
            each += c["optimizer.scaling_bytes"]
        if offload:  # gradients go down and weights come back while the host's cores update
            travel = 6 * elements / c["offload.bytes_per_second"]
            return max(travel, elements / c["offload.elements_per_second"])
        return elements * each / self.memory


#: Operations after fusing, as a share of eager's.
FUSED_STARTS: Mapping[str, float] = {"none": 1.0, "kernels": 0.9, "compiled": 0.4}


def operations(block: Block, framework: Framework) -> float:
    """Operations started in a forward pass: a count by kind of work, right to a third."""
    count = 3 * len(block.products) + (20 if block.attention else 0) + 6
    if block.experts:
        count += 20
    return count * FUSED_STARTS[framework.fused]


def split_key(layout: Layout) -> tuple[object, ...]:
    """The part of a layout that a rank's part of a micro-batch depends on."""
    return layout.tp, layout.cp, layout.ep, layout.sequence_parallel, layout.micro_batch


def split_product(product: Product, layout: Layout) -> tuple[float, float, float]:
    """Rows, inner and columns of a rank's part of a product of one micro-batch."""
    rows = product.rows * layout.micro_batch / layout.cp
    inner, columns = float(product.inner), float(product.columns)
    if layout.tp > 1 and axis_split(product.split):
        if product.name.endswith((".o", ".down")):  # split by rows: the inner size is divided
            inner /= layout.tp
        else:
            columns /= layout.tp
    return rows, inner, columns


@lru_cache(maxsize=65536)
def _tiles_used(rows: float, columns: float, groups: int, units: int) -> float:
    """Share of the device's cores at work with the best of the library's tiles: the last wave may be partly idle, and
    so may the tiles at the edge."""
    best = 0.0
    for high, wide, reach in TILES:
        tiles = -(-rows // high) * -(-columns // wide) * groups
        waves = -(-tiles // units)
        inside = rows * columns * groups / (tiles * high * wide)
        best = max(best, reach * inside * tiles / (waves * units))
    return best


def elementwise_share(block: Block, layout: Layout, kind: str, precision: str) -> float:
    """Share of a block's memory-bound work on one tensor-parallel rank, from how its saved activations are split."""
    tp = layout.tp
    if tp == 1:
        return 1.0
    tensors = [saved for saved in block.saved if saved.is_kept(kind, precision)]
    whole = sum(saved.elements for saved in tensors)
    if not whole:
        return 1 / tp if layout.sequence_parallel else 1.0
    split = sum(s.elements for s in tensors if s.split == "tp" or (s.split == "sp" and layout.sequence_parallel))
    return (whole - split + split / tp) / whole
