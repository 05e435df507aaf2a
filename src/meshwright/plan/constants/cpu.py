"""Constants of training on CPU cores and of gloo between processes, measured on one machine, not fitted to steps.

`meshwright calibrate machine` measured them on 2 cores of an AMD EPYC with AVX512_BF16 under torch 2.13. Shares of peak
are of `cluster.cpu_cluster`'s figures, and may exceed one: a core clocks higher than stated.
"""

from __future__ import annotations

from meshwright.plan.constants.gpu import Constant

_OURS = "meshwright calibrate machine, EPYC with AVX512_BF16"
_PEAK, _MEMORY, _LINK = "share of peak", "share of memory speed", "share of the link"


def _row(name: str, value: float, unit: str, what: str, prior: float = 0.5) -> Constant:
    return Constant(name, value, unit, what, _OURS, prior)


CPU_CONSTANTS: tuple[Constant, ...] = (
    # products of matrices: the arithmetic, what they read and write, and the start
    _row("cpu.product.fp32.share", 1.10, _PEAK, "large products of activations and weights", 0.2),
    _row("cpu.product.fp32.weight_share", 1.09, _PEAK, "large products that give a weight's gradient", 0.2),
    _row("cpu.product.bf16.share", 1.28, _PEAK, "large products of activations and weights", 0.2),
    _row("cpu.product.bf16.weight_share", 1.22, _PEAK, "large products that give a weight's gradient", 0.2),
    _row("cpu.product.operand_share", 1.0, _MEMORY, "operands and results of products"),
    _row("cpu.product.start_seconds", 6e-6, "s", "start of a product"),
    # attention, as nn.Attention runs it
    _row("cpu.attention.fp32.share", 0.75, _PEAK, "products of attention"),
    _row("cpu.attention.bf16.share", 1.4, _PEAK, "products of attention"),
    _row("cpu.attention.fp32.score_seconds", 2.5e-10, "s", "softmax of one score, forward, one thread"),
    _row("cpu.attention.bf16.score_seconds", 2.05e-9, "s", "softmax of one score, forward, one thread"),
    _row("cpu.attention.fp32.score_backward_seconds", 2.5e-10, "s", "softmax of one score, backward, one thread"),
    _row("cpu.attention.bf16.score_backward_seconds", 2.3e-9, "s", "softmax of one score, backward, one thread"),
    # memory-bound work
    _row("cpu.elementwise.fp32.small_share", 0.72, _MEMORY, "chains of small operations on tensors of 1 MiB"),
    _row("cpu.elementwise.fp32.large_share", 0.50, _MEMORY, "chains of small operations on tensors of 8 MiB and more"),
    _row("cpu.elementwise.bf16.small_share", 0.33, _MEMORY, "chains of small operations on tensors of 1 MiB"),
    _row("cpu.elementwise.bf16.large_share", 0.29, _MEMORY, "chains of small operations on tensors of 8 MiB and more"),
    _row("cpu.loss.fp32.small_seconds", 1.7e-9, "s", "loss of one logit, both ways, one thread, rows of 2^20 logits"),
    _row("cpu.loss.fp32.large_seconds", 2.2e-9, "s", "the same, 2^22 logits and more"),
    _row("cpu.loss.bf16.small_seconds", 1.8e-9, "s", "loss of one logit, both ways, one thread, rows of 2^20 logits"),
    _row("cpu.loss.bf16.large_seconds", 2.3e-9, "s", "the same, 2^22 logits and more"),
    _row("cpu.copy.share", 1.2, _MEMORY, "copies of weights and gradients"),
    _row("cpu.optimizer.share", 1.35, _MEMORY, "fused AdamW, norm and clipping"),
    # the host's work
    _row("cpu.host.share", 0.75, "x 6 us", "start of one operation, forward or backward"),
    _row("cpu.host.sharding.fp32.seconds", 0.55e-3, "s", "a block that FSDP2 wraps, per micro-batch"),
    _row("cpu.host.sharding.bf16.seconds", 0.9e-3, "s", "a block that FSDP2 wraps, per micro-batch"),
    _row("cpu.host.checkpoint_seconds", 1.0e-3, "s", "a block that is recomputed, per micro-batch"),
    _row("cpu.data.unit_seconds", 8e-9, "s", "reading a token of the batch"),
    _row("cpu.host.step_seconds", 4e-3, "s", "a step: batch, clipping, events", 0.7),
    Constant("cpu.compiled.share", 0.95, "share", "of a block's own seconds, compiled", "bench/speed/train.py"),
    # threads of one process
    _row("cpu.threads.product_share", 0.9, "share", "what a further thread adds to products", 0.2),
    _row("cpu.threads.memory_share", 0.7, "share", "what a further thread adds to all other work", 0.3),
    # gloo between processes of a machine
    _row("cpu.net.all_reduce.share", 1.25, _LINK, "bytes on the wire, large messages"),
    _row("cpu.net.all_gather.share", 1.0, _LINK, "bytes on the wire, large messages"),
    _row("cpu.net.reduce_scatter.share", 0.48, _LINK, "bytes on the wire, large messages"),
    _row("cpu.net.point_to_point.share", 3.0, _LINK, "bytes on the wire, large messages"),
    _row("cpu.net.all_reduce.latency", 1.5, "x 0.35 ms", "8 bytes"),
    _row("cpu.net.all_gather.latency", 1.4, "x 0.35 ms", "8 bytes"),
    _row("cpu.net.reduce_scatter.latency", 1.5, "x 0.35 ms", "8 bytes"),
    _row("cpu.net.point_to_point.latency", 0.25, "x 0.35 ms", "8 bytes"),
)
