"""Seconds of a training step's parts on CPU cores, where host and device are one and a core moves every byte.

Unlike on a GPU, starting operations adds to their work; FSDP2 copies weights and gradients in and out of its buffers
for every micro-batch, whatever the degree; each of gloo's collectives has constants of its own. (First touches of new
memory would cost more than the arithmetic; `launch` keeps memory between steps.)
"""

from __future__ import annotations

import math

from meshwright.card import AttentionShape, Block
from meshwright.cluster import Device
from meshwright.layout import Layout
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.cost.block_memory import ELEMENT_BYTES
from meshwright.plan.cost.gpu import BlockSeconds, Compute, elementwise_share, local_elements, split_product
from meshwright.plan.rules import FRAMEWORKS, Framework

#: Queries that our blocked attention takes at once (nn/blocked.py), and the length up to which it saves probabilities.
QUERIES_AT_ONCE, KEPT_LENGTH = 128, 512
#: Bytes read and written per parameter: unsharding (copy in, gather, copy out), adding a micro-batch's gradients to
#: earlier ones, reducing (copy in, move, copy out), AdamW (7 x 4) with the norm and the scaling of clipping (3 x 4).
GATHER_BYTES = {"fp32": 24, "bf16": 14}
ACCUMULATE_BYTES = {"fp32": 12, "bf16": 18}
REDUCE_BYTES = {"fp32": 24, "bf16": 26}
OPTIMIZER_BYTES = 40
#: Sizes at which the probe times memory-bound chains (bytes of the largest tensor) and the loss (logits at once).
CHAIN_BYTES, LOSS_LOGITS = (1 << 20, 1 << 23), (1 << 20, 1 << 22)
LOSS_ROWS_AT_ONCE = 1024  # nn/loss.py
#: Starts of a forward that selective recompute costs: it asks Python, twice per operation, what to save.
SELECTIVE_STARTS = 8
#: Element moves of one logit in a head's card, for cross-entropy, which has a constant of its own here.
LOSS_MOVES = 6


class CpuCompute(Compute):
    """Seconds on a process of one or more threads at one precision."""

    def __init__(
        self,
        device: Device,
        precision: str,
        profile: Profile = DATASHEET,
        framework: Framework = FRAMEWORKS["meshwright"],
    ) -> None:
        self.device, self.precision, self.framework, self.kind = device, precision, framework, "cpu"
        self.word = "fp32" if precision == "fp32" else "bf16"  # 16-bit and smaller words run as bf16 does
        self.bytes = ELEMENT_BYTES[self.word]
        self.c = {
            name.removeprefix("cpu."): value for name, value in profile.constants.items() if name.startswith("cpu.")
        }
        self.threads = max(1, device.units)
        #: Peak and memory speed of the process; the device's figures are those of one thread times the threads.
        self.peak = device.flops[self.word] * self._thread_share("threads.product_share")
        self.memory = device.memory_bytes_per_second * self._thread_share("threads.memory_share")
        self.copies = self.memory * self.c["copy.share"]
        self.launch = device.launch_seconds * self.c["host.share"]
        self.sharding_host = self.c[f"host.sharding.{self.word}.seconds"]
        self.step_seconds = self.c["host.step_seconds"]

    def _thread_share(self, share: str) -> float:
        return (1 + (self.threads - 1) * self.c[share]) / self.threads

    def product(self, rows: float, inner: float, columns: float, groups: int = 1, *, plain: bool = False) -> float:
        """One forward product of activations and weights."""
        return self._product(rows, inner, columns, self.c[f"product.{self.word}.share"])

    def _product(self, rows: float, inner: float, columns: float, share: float) -> float:
        """Arithmetic, and moving the operands and the result, which no cache holds from one product to the next."""
        if rows <= 0 or inner <= 0 or columns <= 0:
            return 0.0
        arithmetic = 2.0 * rows * inner * columns / (self.peak * share)
        moved = (rows * inner + inner * columns + rows * columns) * self.bytes
        return arithmetic + moved / (self.memory * self.c["product.operand_share"]) + self.c["product.start_seconds"]

    def products(self, block: Block, layout: Layout) -> tuple[float, float, float]:
        """Seconds of a block's products: forward, backward, and the part of the backward for weight gradients."""
        forward = backward = weight = 0.0
        ahead_share, weight_share = (self.c[f"product.{self.word}.{end}share"] for end in ("", "weight_"))
        for product in block.products:
            rows, inner, columns = split_product(product, layout)
            forward += self._product(rows, inner, columns, ahead_share)
            of_weight = self._product(columns, rows, inner, weight_share)
            backward += self._product(rows, columns, inner, ahead_share) + of_weight
            weight += of_weight
        return forward, backward, weight

    def attention(self, shape: AttentionShape, layout: Layout) -> tuple[float, float]:
        """Seconds of nn.Attention, forward and backward: products of whole blocks of queries, and a softmax."""
        block = min(QUERIES_AT_ONCE, shape.seq_len)
        computed = (shape.seq_len + block) / (2 * shape.seq_len) if shape.causal else 1.0
        scores = shape.heads * shape.seq_len**2 * computed * layout.micro_batch / (layout.tp * layout.cp)
        products = 4 * shape.head_dim * scores / (self.peak * self.c[f"attention.{self.word}.share"])
        softmax = scores / (self.threads * self._thread_share("threads.memory_share"))
        forward = products + softmax * self.c[f"attention.{self.word}.score_seconds"]
        backward = 2 * products + softmax * self.c[f"attention.{self.word}.score_backward_seconds"]
        if self.word == "fp32" or shape.seq_len > KEPT_LENGTH:  # probabilities are recomputed
            backward += forward - products / 2
        return forward, backward

    def elementwise(self, block: Block, layout: Layout) -> float:
        """Seconds of a block's memory-bound work, forward, without the loss. All its tensors count as large as the
        largest that its products write."""
        largest = max((p.rows * p.columns for p in block.products), default=block.output_elements)
        largest *= layout.micro_batch * self.bytes // (layout.tp * layout.cp)
        small, large = (self.c[f"elementwise.{self.word}.{size}_share"] for size in ("small", "large"))
        return self._moved_bytes(block, layout) / (self.memory * _interpolated(largest, CHAIN_BYTES, small, large))

    def elementwise_backward(self, block: Block, layout: Layout) -> float:
        """The same backward: twice the bytes, and saved tensors come from memory, not from caches."""
        return 2 * self._moved_bytes(block, layout) / (self.memory * self.c[f"elementwise.{self.word}.large_share"])

    def _moved_bytes(self, block: Block, layout: Layout) -> float:
        """Bytes moved by the memory-bound work of a forward pass."""
        elements = float(block.elementwise_elements)
        if block.kind == "head":
            elements = max(0.0, elements - LOSS_MOVES * block.output_elements)
        elements *= layout.micro_batch * elementwise_share(block, layout, "cpu", self.word) / layout.cp
        return elements * self.bytes

    def loss(self, block: Block, layout: Layout) -> float:
        """Seconds of cross-entropy on the head's logits; the forward computes its gradient too."""
        if block.kind != "head" or not block.output_elements:
            return 0.0
        logits = block.output_elements * layout.micro_batch / (layout.tp * layout.cp)
        columns = max((product.columns for product in block.products), default=1)
        at_once = min(logits, LOSS_ROWS_AT_ONCE * columns / layout.tp)
        small, large = (self.c[f"loss.{self.word}.{size}_seconds"] for size in ("small", "large"))
        each = _interpolated(at_once, LOSS_LOGITS, small, large)
        each /= self.threads * self._thread_share("threads.memory_share")
        return logits * each

    def sharding(self, block: Block, layout: Layout) -> tuple[float, float]:
        """Seconds of FSDP2 for a block in the forward and the backward of a micro-batch, without the network: hooks,
        copies, and adding to the gradients of earlier micro-batches (`step` subtracts the first micro-batch's)."""
        if not block.parameters:
            return 0.0, 0.0
        elements = local_elements(block.parameters, layout.tp, layout.ep)
        gather = elements * GATHER_BYTES[self.word] / self.copies if layout.pp == 1 else 0.0
        again = gather if layout.shard > 1 else 0.0
        accumulate = elements * ACCUMULATE_BYTES[self.word] / self.copies
        return self.sharding_host / 2 + gather, self.sharding_host / 2 + again + accumulate

    def block(self, block: Block, layout: Layout) -> BlockSeconds:
        """One micro-batch through a block on one rank, without waits for other ranks."""
        forward, backward, weight = self.products(block, layout)
        saved = forward  # by selective recompute: products, and attention where it is torch's own operation
        if block.attention:
            ahead, back = self.attention(block.attention, layout)
            forward, backward = forward + ahead, backward + back
            saved += ahead if self.word == "fp32" else 0.0
        elementwise = self.elementwise(block, layout)
        starts = operations(block, self.word) * self.launch
        recompute = host_recompute = 0.0
        if layout.recompute != "none" and block.parameters:
            full = layout.recompute == "full"
            recompute = forward + elementwise - (self._last_product(block, layout) if full else saved)
            host_recompute = self.c["host.checkpoint_seconds"] + starts * (1 if full else SELECTIVE_STARTS)
        gathered, reduced = self.sharding(block, layout)
        share = self.c["compiled.share"] if self.framework.fused == "compiled" else 1.0
        return BlockSeconds(
            forward=share * (forward + elementwise + self.loss(block, layout)) + gathered,
            backward=share * (backward + self.elementwise_backward(block, layout)) + reduced,
            recompute=share * recompute,
            weight=share * weight,
            host_forward=starts,
            host_backward=2 * starts,
            host_recompute=host_recompute,
        )

    def _last_product(self, block: Block, layout: Layout) -> float:
        """Forward of a block's last product. Recomputing stops before it, since nothing after it is saved."""
        if not block.products:
            return 0.0
        return self._product(*split_product(block.products[-1], layout), self.c[f"product.{self.word}.share"])

    def optimizer(self, elements: float, *, offload: bool = False) -> float:
        """AdamW on the rank's `elements` parameters, with the norm and the scaling of clipping."""
        return elements * OPTIMIZER_BYTES / (self.memory * self.c["optimizer.share"])

    def step(self, elements: float, layout: Layout) -> float:
        """Per step, for `elements` parameters of the rank's stage: copies around the reduction, less the adding of the
        first micro-batch; in a pipeline, copies of the one gathering; and the host's work."""
        moved = elements * (REDUCE_BYTES[self.word] - ACCUMULATE_BYTES[self.word])
        if layout.pp > 1:
            moved += elements * GATHER_BYTES[self.word]
        return moved / self.copies + self.step_seconds


def _interpolated(size: float, sizes: tuple[int, int], small: float, large: float) -> float:
    """A constant at `size`, from those at two `sizes`: geometric between them, constant outside."""
    if size <= sizes[0]:
        return small
    way = min(1.0, math.log(size / sizes[0]) / math.log(sizes[1] / sizes[0]))
    return float(small ** (1 - way) * large**way)


def operations(block: Block, word: str) -> int:
    """Operations that eager mode starts in a forward pass: a count by kind of work, right to a third. Blocked attention
    (bf16) starts twenty, and fourteen per block of queries; the loss after a head twenty-five."""
    count = 3 * len(block.products) + 6 + (25 if block.kind == "head" else 0)
    if block.attention:
        count += 20
        if word == "bf16":
            count += 20 + 14 * -(-block.attention.seq_len // QUERIES_AT_ONCE)
    return count
