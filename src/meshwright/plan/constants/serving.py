"""Constants of the serving model, each with its source; none was fitted to a measured latency or throughput.

Every Profile has them, under "serving."; fits to training runs do not change them.
"""

from __future__ import annotations

from meshwright.plan.constants.gpu import GUESS, JOINED, Constant

_PART = "assumed: less than all, as every measured kernel"
_PACKED = "oneDNN's packed products timed alone on one machine, best of five"
_TINY = "steps of a model too small to have arithmetic, 2 and 18 layers, timed on one machine"

SERVING_CONSTANTS: tuple[Constant, ...] = (
    Constant(
        "serving.cuda.real.share", 0.78, "share of peak", "large products, where not measured", "ml-engineering MAMF"
    ),
    Constant("serving.cuda.memory.share", 0.93, "share of peak", "memory speed, where not measured", "BabelStream Dot"),
    Constant("serving.cuda.product.share", 0.90, "share of measured", "products of many rows", "Azure guide, cuBLASLt"),
    Constant("serving.cuda.weights.share", 0.90, "share of measured", "reading weights", _PART),
    Constant("serving.cuda.cache.share", 0.80, "share of measured", "reading keys and values by pages", _PART),
    Constant("serving.cuda.attention.share", 0.55, "share of measured", "fused attention", "FlashAttention-2 paper"),
    Constant("serving.cuda.elementwise.share", 0.70, "share of measured", "norms and activations, fused", _PART),
    Constant("serving.cuda.roofline", 4.0, "exponent", "how sharply arithmetic and reading overlap", JOINED),
    Constant("serving.cuda.kernel_seconds", 2.5e-6, "s", "start and tail of one kernel of a captured graph", GUESS),
    Constant("serving.cuda.reduce_seconds", 7e-6, "s", "a small all-reduce written for decoding", GUESS),
    Constant("serving.cuda.step_seconds", 1e-3, "s", "scheduling, sampling and text of one step", GUESS),
    Constant("serving.cuda.row_seconds", 4e-6, "s", "the same for each sequence", GUESS),
    Constant("serving.cuda.request_seconds", 15e-3, "s", "HTTP, tokenizing, the first text out", GUESS),
    Constant("serving.cuda.workspace_bytes", 3e9, "bytes", "context, libraries and captured graphs", "vLLM's reports"),
    Constant("serving.cpu.real.share", 1.0, "share of peak", "the peak is the yardstick here", "cluster.py"),
    Constant("serving.cpu.product.fp32.share", 2.4, "share of peak", "products of many rows", _PACKED),
    Constant("serving.cpu.product.bf16.share", 1.25, "share of peak", "products of many rows", _PACKED),
    Constant("serving.cpu.core.share", 0.3, "share", "what a further core adds to the memory's speed", _PACKED),
    Constant("serving.cpu.weights.share", 1.1, "share of a core's", "reading packed weights", _PACKED),
    Constant("serving.cpu.cached.share", 2.0, "share of peak", "reading weights that stay in the cache", _PACKED),
    Constant("serving.cpu.cached_bytes", 20e6, "bytes", "weights that stay in the cache", "engine/runner.py"),
    Constant("serving.cpu.cache.share", 0.5, "share of peak", "reading keys and values", _PACKED),
    Constant("serving.cpu.attention.share", 0.5, "share of peak", "attention over a prompt", "one machine"),
    Constant("serving.cpu.elementwise.share", 0.22, "share of peak", "small operations in eager mode", "one machine"),
    Constant("serving.cpu.roofline", 1.25, "exponent", "how little arithmetic and reading overlap", _PACKED),
    Constant("serving.cpu.step_seconds", 1e-4, "s", "scheduling, sampling and text of one step", _TINY),
    Constant("serving.cpu.row_seconds", 1e-5, "s", "the same for each sequence", _TINY),
    Constant("serving.cpu.pair_seconds", 2e-6, "s", "one sequence and key head of a layer's attention", _TINY),
    Constant("serving.cpu.shape_seconds", 2e-3, "s", "making bf16 attention for a new length, each step", _TINY),
    Constant("serving.cpu.request_seconds", 3e-3, "s", "HTTP, tokenizing, the first text out", GUESS),
    Constant("serving.cpu.workspace_bytes", 4.5e8, "bytes", "libraries", "resident size of an empty process"),
)
#: 90 % intervals by regime, as factors of the predicted figure; nothing was fitted.
SERVING_INTERVALS: dict[str, tuple[float, float]] = {
    "serving": (0.5, 2.0),
    "serving.cuda.tpot": (0.7, 1.45),
    "serving.cuda.ttft": (0.5, 3.0),
    "serving.cuda.throughput": (0.6, 1.4),
    "serving.cuda.throughput.mixture": (0.5, 1.6),
}
