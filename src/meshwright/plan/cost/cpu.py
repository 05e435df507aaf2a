"""Seconds of a training step's parts on CPU cores, where host and device are one and a core moves every byte.

What differs from a GPU: the cost of starting operations adds to their work; FSDP2 copies weights and gradients in and
out of its buffers for every micro-batch, whatever the degree; gloo's collectives differ among themselves. (Memory that
the system has just given costs more to touch than to compute; `launch` has it kept between steps.)
"""

from __future__ import annotations

import math

from meshwright.card import AttentionShape, Block
from meshwright.cluster import Device
from meshwright.layout import Layout
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.cost.gpu import BlockSeconds, Compute, kept_share, local_elements, split_product
from meshwright.plan.rules import FRAMEWORKS, Framework

#: Queries that our blocked attention takes at once (nn/blocked.py), and the length up to which it keeps probabilities.
QUERIES_AT_ONCE, KEPT_LENGTH = 128, 512
#: Bytes read and written for each parameter: unsharding (copy in, gather, copy out), adding a micro-batch's gradients
#: to those before, reducing (copy in, move, copy out), AdamW (7 x 4), and the norm and the scaling of clipping (3 x 4).
GATHER_BYTES = {"fp32": 24, "bf16": 14}
ACCUMULATE_BYTES = {"fp32": 12, "bf16": 18}
REDUCE_BYTES = {"fp32": 24, "bf16": 26}
OPTIMIZER_BYTES = 40
BYTES = {"fp32": 4, "bf16": 2}
#: StageElements at which the probe times memory-bound chains (bytes of the largest tensor) and the loss (logits at once).
CHAIN_BYTES, LOSS_LOGITS = (1 << 20, 1 << 23), (1 << 20, 1 << 22)
LOSS_ROWS_AT_ONCE = 1024  # nn/loss.py
#: Starts of a forward that selective recompute takes: it hands every operation, twice, to Python, to hear what is kept.
SELECTIVE_STARTS = 8
#: Memory-bound element moves of one logit in a head's card: cross-entropy, which has a constant of its own.
LOSS_MOVES = 6


class CpuCompute(Compute):
    """A process of one or more threads at one precision: what Compute is for GPUs."""

    def __init__(
        self,
        device: Device,
        precision: str,
        profile: Profile = DATASHEET,
        framework: Framework = FRAMEWORKS["meshwright"],
    ) -> None:
        self.device, self.precision, self.framework, self.kind = device, precision, framework, "cpu"
        self.word = "fp32" if precision == "fp32" else "bf16"  # 16-bit and smaller words run as bf16 does
        self.bytes = BYTES[self.word]
        self.c = {
            name.removeprefix("cpu."): value for name, value in profile.constants.items() if name.startswith("cpu.")
        }
        self.threads = max(1, device.units)
        #: Peak and memory speed of the process: the device counts threads as if each added a whole one.
        self.peak = device.flops[self.word] * self._together("threads.product_share")
        self.memory = device.memory_bytes_per_second * self._together("threads.memory_share")
        self.copies = self.memory * self.c["copy.share"]
        self.launch = device.launch_seconds * self.c["host.share"]
        self.sharding_host = self.c[f"host.sharding.{self.word}.seconds"]
        self.step_seconds = self.c["host.step_seconds"]

    def _together(self, share: str) -> float:
        return (1 + (self.threads - 1) * self.c[share]) / self.threads

    def product(self, rows: float, inner: float, columns: float, groups: int = 1, *, plain: bool = False) -> float:
        """One forward product of activations and weights."""
        return self._product(rows, inner, columns, self.c[f"product.{self.word}.share"])

    def _product(self, rows: float, inner: float, columns: float, share: float) -> float:
        """Arithmetic, and its operands and result over memory: between one product and the next of a model, caches have
        held others."""
        if rows <= 0 or inner <= 0 or columns <= 0:
            return 0.0
        arithmetic = 2.0 * rows * inner * columns / (self.peak * share)
        moved = (rows * inner + inner * columns + rows * columns) * self.bytes
        return arithmetic + moved / (self.memory * self.c["product.operand_share"]) + self.c["product.start_seconds"]

    def products(self, block: Block, layout: Layout) -> tuple[float, float, float]:
        """Seconds of a block's products: forward, backward, and the weights' gradients in it."""
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
        """Attention as nn.Attention runs it, forward and backward: products of whole blocks of queries, a softmax."""
        block = min(QUERIES_AT_ONCE, shape.seq_len)
        computed = (shape.seq_len + block) / (2 * shape.seq_len) if shape.causal else 1.0
        scores = shape.heads * shape.seq_len**2 * computed * layout.micro_batch / (layout.tp * layout.cp)
        products = 4 * shape.head_dim * scores / (self.peak * self.c[f"attention.{self.word}.share"])
        softmax = scores / (self.threads * self._together("threads.memory_share"))
        forward = products + softmax * self.c[f"attention.{self.word}.score_seconds"]
        backward = 2 * products + softmax * self.c[f"attention.{self.word}.score_backward_seconds"]
        if self.word == "fp32" or shape.seq_len > KEPT_LENGTH:  # the probabilities are computed again
            backward += forward - products / 2
        return forward, backward

    def elementwise(self, block: Block, layout: Layout) -> float:
        """Forward of a block's memory-bound work but for the loss; its tensors are taken to be as large as the largest
        that its products write."""
        largest = max((p.rows * p.columns for p in block.products), default=block.output_elements)
        largest *= layout.micro_batch * self.bytes // (layout.tp * layout.cp)
        small, large = (self.c[f"elementwise.{self.word}.{size}_share"] for size in ("small", "large"))
        return self._moved(block, layout) / (self.memory * _between(largest, CHAIN_BYTES, small, large))

    def elementwise_backward(self, block: Block, layout: Layout) -> float:
        """The same backward: twice the bytes, and what the forward kept comes from memory, the caches having held
        other blocks since."""
        return 2 * self._moved(block, layout) / (self.memory * self.c[f"elementwise.{self.word}.large_share"])

    def _moved(self, block: Block, layout: Layout) -> float:
        """Bytes that the memory-bound work of a forward pass moves."""
        elements = float(block.elementwise_elements)
        if block.kind == "head":
            elements = max(0.0, elements - LOSS_MOVES * block.output_elements)
        elements *= layout.micro_batch * kept_share(block, layout, "cpu", self.word) / layout.cp
        return elements * self.bytes

    def loss(self, block: Block, layout: Layout) -> float:
        """Cross-entropy on the head's logits; its gradient is formed in the forward pass."""
        if block.kind != "head" or not block.output_elements:
            return 0.0
        logits = block.output_elements * layout.micro_batch / (layout.tp * layout.cp)
        columns = max((product.columns for product in block.products), default=1)
        at_once = min(logits, LOSS_ROWS_AT_ONCE * columns / layout.tp)
        small, large = (self.c[f"loss.{self.word}.{size}_seconds"] for size in ("small", "large"))
        each = _between(at_once, LOSS_LOGITS, small, large)
        each /= self.threads * self._together("threads.memory_share")
        return logits * each

    def sharding(self, block: Block, layout: Layout) -> tuple[float, float]:
        """What FSDP2 costs a block in the forward and the backward of a micro-batch, beside the wire: its hooks, its
        copies, and adding to the gradients of the micro-batches before (`once` takes back the first's)."""
        if not block.parameters:
            return 0.0, 0.0
        gather = self._gather_copies(block, layout) if layout.pp == 1 else 0.0
        again = gather if layout.shard > 1 else 0.0
        return self.sharding_host / 2 + gather, self.sharding_host / 2 + again + self._accumulating(block, layout)

    def _gather_copies(self, block: Block, layout: Layout) -> float:
        return local_elements(block.parameters, layout.tp, layout.ep) * GATHER_BYTES[self.word] / self.copies

    def _accumulating(self, block: Block, layout: Layout) -> float:
        return local_elements(block.parameters, layout.tp, layout.ep) * ACCUMULATE_BYTES[self.word] / self.copies

    def block(self, block: Block, layout: Layout) -> BlockSeconds:
        """One micro-batch through a block on one rank, without what it waits for from others."""
        forward, backward, weight = self.products(block, layout)
        kept = forward  # by selective recompute: products, and attention where it is torch's own operation
        if block.attention:
            ahead, back = self.attention(block.attention, layout)
            forward, backward = forward + ahead, backward + back
            kept += ahead if self.word == "fp32" else 0.0
        moved = self.elementwise(block, layout)
        starts = operations(block, self.word) * self.launch
        recomputed, host_again = 0.0, 0.0
        if layout.recompute != "none" and block.parameters:
            full = layout.recompute == "full"
            recomputed = forward + moved - (self._last_product(block, layout) if full else kept)
            host_again = self.c["host.checkpoint_seconds"] + starts * (1 if full else SELECTIVE_STARTS)
        gathered, reduced = self.sharding(block, layout)
        share = self.c["compiled.share"] if self.framework.fused == "compiled" else 1.0
        return BlockSeconds(
            forward=share * (forward + moved + self.loss(block, layout)) + gathered,
            backward=share * (backward + self.elementwise_backward(block, layout)) + reduced,
            recompute=share * recomputed,
            weight=share * weight,
            host_forward=starts,
            host_backward=2 * starts,
            host_again=host_again,
        )

    def _last_product(self, block: Block, layout: Layout) -> float:
        """Forward of a block's last product: recomputing stops before it, since nothing is kept of what follows."""
        if not block.products:
            return 0.0
        return self._product(*split_product(block.products[-1], layout), self.c[f"product.{self.word}.share"])

    def optimizer(self, elements: float, *, offload: bool = False) -> float:
        """AdamW on `elements` parameters of this rank, the norm and the scaling of clipping."""
        return elements * OPTIMIZER_BYTES / (self.memory * self.c["optimizer.share"])

    def once(self, elements: float, layout: Layout) -> float:
        """Once a step, for `elements` parameters of this rank's stage: copies around the reduction, in a pipeline the
        copies of the one gathering, less the first micro-batch's adding; and the step's own host work."""
        moved = elements * (REDUCE_BYTES[self.word] - ACCUMULATE_BYTES[self.word])
        if layout.pp > 1:
            moved += elements * GATHER_BYTES[self.word]
        return moved / self.copies + self.step_seconds


def _between(size: float, sizes: tuple[int, int], small: float, large: float) -> float:
    """A constant at `size`, between those at two sizes: geometric in between, constant beyond."""
    if size <= sizes[0]:
        return small
    way = min(1.0, math.log(size / sizes[0]) / math.log(sizes[1] / sizes[0]))
    return float(small ** (1 - way) * large**way)


def operations(block: Block, word: str) -> int:
    """Operations that eager mode starts in a forward pass, by kind of work: a count good to a third. Blocked attention
    (bf16) starts twenty, and fourteen for each block of queries; the loss behind a head twenty-five."""
    count = 3 * len(block.products) + 6 + (25 if block.kind == "head" else 0)
    if block.attention:
        count += 20
        if word == "bf16":
            count += 20 + 14 * -(-block.attention.seq_len // QUERIES_AT_ONCE)
    return count
