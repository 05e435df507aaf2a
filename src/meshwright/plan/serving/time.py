"""Seconds of one serving step, of decoding rows and prompt tokens, on one pipeline stage of one replica.

A product takes its arithmetic and the reading of its weights, overlapped as far as the device can: reading dominates
with few rows, arithmetic with many. A mixture reads the experts that its rows choose. Attention of a decoding row reads
the keys and values of all earlier tokens; attention of a prompt computes. Every kernel takes a fixed time to start; on
an engine without captured graphs, the host's. Tensor parallelism adds two all-reduces per layer, small enough for
latency to dominate. Sources: Pope et al., "Efficiently Scaling Transformer Inference" (2022);
DeepSeek-V2 (2024) for latent attention with absorbed projections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.cluster import CPU_MEMORY_BYTES_PER_SECOND, Cluster, Device
from meshwright.families.decoder_shape import DecoderShape
from meshwright.plan.constants import Profile
from meshwright.plan.cost.network import network
from meshwright.plan.serving.work import LayerWork, Matrix, layer_work

#: Bytes of one weight, including the scales of blocks of 32 to 128 weights.
WEIGHT_BYTES: Mapping[str, float] = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.01, "int8": 1.01, "fp4": 0.5625}
#: From this speed on, kernels that write into each other's memory reduce faster than a ring.
_DIRECT_BYTES_PER_SECOND = 100e9
#: Unused rows of the last tile of an expert, on average: half of a tile of 16.
_EXPERT_TILE_ROWS = 8
PARTS = ("weights", "cache", "compute", "launch", "collectives", "hops", "host")


@dataclass(frozen=True)
class Server:
    """How an engine keeps its cache and runs a step. One row of `SERVERS`.

    `precisions` are those of its weights; `chunk_tokens` the most prompt tokens of a step; `page_tokens` 0 means one
    contiguous slot per sequence, as long as the longest. A dense layer starts `kernels`, a mixture `expert_kernels`
    more; with `graphs` they are captured and replayed, so the host does not start them. `weight_copies` counts the
    weights' copies in memory while they are loaded. On a CPU that is slow at bf16, steps of `widens_rows` rows and more
    (0: none) are computed in fp32, from weights of which `widened_bytes` are in fp32 at a time.
    """

    name: str
    precisions: tuple[str, ...]
    chunk_tokens: int
    page_tokens: int
    most_batch: int
    kernels: int
    expert_kernels: int
    graphs: bool
    pipelines: bool
    replicas: bool
    splits_heads: bool  # tensor ranks may share a key head
    spreads_attention: bool  # ranks that share experts may split the sequences
    usable: float  # share of a device's memory
    weight_copies: float
    widens_rows: int = 0
    widened_bytes: int = 0


_OURS = Server(
    "meshwright",
    ("fp32", "bf16"),
    chunk_tokens=512,
    page_tokens=0,
    most_batch=256,
    kernels=25,
    expert_kernels=0,
    graphs=False,
    pipelines=False,
    replicas=False,
    splits_heads=False,
    spreads_attention=False,
    usable=0.9,
    weight_copies=2.0,
    widens_rows=8,
    widened_bytes=4 << 20,
)
_PAGED = Server(
    "paged",
    ("bf16", "fp16", "fp8", "int8", "fp4", "fp32"),
    chunk_tokens=8192,
    page_tokens=16,
    most_batch=2048,
    kernels=11,
    expert_kernels=9,
    graphs=True,
    pipelines=True,
    replicas=True,
    splits_heads=True,
    spreads_attention=True,
    usable=0.9,
    weight_copies=1.0,
)
#: Our engine (docs/engine.md), and those with paged caches and captured graphs (vLLM, TensorRT-LLM, SGLang).
SERVERS: Mapping[str, Server] = {server.name: server for server in (_OURS, _PAGED)}


@dataclass(frozen=True)
class Step:
    """The work of one step: `rows` that decode with `context` earlier tokens each, and `prompt` tokens to read, whose
    queries see `prompt_context` tokens on average; `sampled` rows (None: `rows`) get a token."""

    rows: float
    context: float
    prompt: float = 0.0
    prompt_context: float = 0.0
    sampled: float | None = None


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step by cause (`PARTS`)."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class StepModel:
    """Times the steps of one shape on `tp` x `pp` devices of a cluster, for one precision of weights and cache."""

    def __init__(
        self,
        shape: DecoderShape,
        cluster: Cluster,
        server: Server,
        profile: Profile,
        *,
        tp: int = 1,
        pp: int = 1,
        precision: str = "bf16",
        cache_bytes: float | None = None,
        attention_dp: bool = False,
    ) -> None:
        self.shape, self.cluster, self.server = shape, cluster, server
        self.tp, self.pp, self.precision = tp, pp, precision
        #: The ranks that split attention and dense products, and the ranks that split their rows instead.
        self.split, self.spread = (1, tp) if attention_dp else (tp, 1)
        self.attention_dp = attention_dp
        self.profile, self.device = profile, cluster.device
        self.network = network(cluster, profile)
        self.kind = "cpu" if cluster.device.kind == "cpu" else "cuda"
        self.weight_bytes = WEIGHT_BYTES[precision]
        self.wide_bytes = 4.0 if precision == "fp32" else 2.0
        self.cache_bytes = self.wide_bytes if cache_bytes is None else cache_bytes
        mixed = sum(shape.mixed(layer) for layer in range(shape.layers))
        kinds = ((False, shape.layers - mixed), (True, mixed))
        share = math.ceil(shape.layers / pp) / shape.layers
        #: (work, number of such layers on the busiest stage)
        self.layers = tuple(
            (layer_work(shape, self.split, kind, self.spread), count * share) for kind, count in kinds if count
        )
        self.group = self.network.group(tp, 1)
        self._direct = self._direct_bytes_per_second()
        #: Whether steps of many rows are computed in fp32.
        self.widens = server.widens_rows > 0 and precision == "bf16" and cluster.device.slow_bf16
        self._flops = self._rate(precision) * self._product_share(precision)
        self._wide_flops = self._rate("fp32") * self._product_share("fp32")
        self._attention = self._rate("fp32" if self.kind == "cpu" else "bf16") * self._c("attention.share")
        self._bandwidth, self._reading = self._memory_speeds()
        self._exponent = self._c("roofline")

    def _memory_speeds(self) -> tuple[float, float]:
        """Bytes per second of the memory, and of reading weights. Cores share the memory; each has its own cache."""
        device, stated = self.device, self.device.memory_bytes_per_second
        if self.kind == "cuda":
            speed = device.real_memory_bytes_per_second or stated * self._c("memory.share")
            return speed, speed * self._c("weights.share")
        cores = max(1.0, stated / CPU_MEMORY_BYTES_PER_SECOND * self.cluster.devices)
        speed = stated * (1 + (cores - 1) * self._c("core.share")) / cores
        read = self.rank_weight_bytes - self._lookup_bytes
        cached = read <= self._c("cached_bytes")
        return speed, stated * self._c("cached.share") if cached else speed * self._c("weights.share")

    def _c(self, name: str) -> float:
        return self.profile[f"serving.{self.kind}.{name}"]

    def _rate(self, precision: str) -> float:
        """Flops per second of large products; weights that the device cannot multiply are widened first."""
        device = self.device
        word = next(word for word in (precision, "bf16", "fp16", "fp32") if word in device.flops)
        real = device.real_flops.get(word) if self.kind == "cuda" else None
        return real or device.flops[word] * self._c("real.share")

    def _product_share(self, precision: str) -> float:
        if self.kind == "cpu":
            return self._c(f"product.{'fp32' if precision == 'fp32' else 'bf16'}.share")
        return self._c("product.share")

    @property
    def rank_weight_bytes(self) -> float:
        """Bytes of the weights of the fullest stage on one rank; token tables and routers in the wide precision."""
        per_layer = 0.0
        for work, count in self.layers:
            small = sum(m.elements for m in work.matrices if m.whole)
            large = sum(m.elements for m in work.matrices if not m.whole) + work.experts * work.expert_elements
            per_layer += count * (small * self.wide_bytes + large * self.weight_bytes)
        head = self.shape.vocab * self.shape.hidden / self.split * self.wide_bytes
        return per_layer + head + self._lookup_bytes

    @property
    def _lookup_bytes(self) -> float:
        """Bytes of the table of token embeddings where it is not the output head's own; an engine that packs the head
        for products keeps a second copy of a tied table."""
        if self.pp > 1 or (self.shape.tied and self.server.page_tokens > 0):
            return 0.0
        return self.shape.vocab * self.shape.hidden / self.split * self.wide_bytes

    @property
    def cache_token_bytes(self) -> float:
        """Bytes of keys and values of a token on one rank of a stage, on average where ranks split the sequences."""
        return sum(work.cache_elements * count for work, count in self.layers) * self.cache_bytes / self.spread

    def step(self, step: Step) -> StepSeconds:
        """One stage's step, without `host` and `hops`, which are of the whole pipeline."""
        parts = dict.fromkeys(PARTS, 0.0)
        all_rows, step = step.rows + step.prompt, self._rank_step(step)
        rows = step.rows + step.prompt
        for work, count in self.layers:
            for matrix in work.matrices:
                self._product(parts, matrix, rows, count)
            if work.experts:
                self._experts(parts, work, all_rows, count)
            self._attend(parts, work, step, count)
            moved = rows * work.moved_elements * self.wide_bytes
            parts["compute"] += count * moved / (self._bandwidth * self._c("elementwise.share"))
            parts["launch"] += count * self._launch(work, step.rows)
            if sums := self._sums(work):
                parts["collectives"] += count * sums * self._reduce(all_rows * self.shape.hidden * self._wire_bytes)
        sampled = step.rows if step.sampled is None else step.sampled
        table = Matrix(self.shape.hidden, self.shape.vocab / self.split, whole=True)
        self._product(parts, table, sampled, 1 / self.pp)
        if self.kind == "cpu" and self.precision != "fp32" and step.rows >= 3:
            parts["launch"] += self._c("shape_seconds")
        return StepSeconds(parts)

    def _rank_step(self, step: Step) -> Step:
        """One rank's part of a step: all of it, unless ranks split the sequences. A prompt is on one rank."""
        if self.spread == 1:
            return step
        rows = max(min(1.0, step.rows), step.rows / self.spread)
        prompt = max(min(step.prompt, 2 * step.prompt_context), step.prompt / self.spread)
        sampled = None if step.sampled is None else max(min(1.0, step.sampled), step.sampled / self.spread)
        return Step(rows, step.context, prompt, step.prompt_context, sampled)

    def _sums(self, work: LayerWork) -> int:
        """All-reduces of a layer: after attention and after feed-forward. Ranks that split the rows gather them for the
        experts and scatter the sums, which together is one."""
        if self.tp == 1:
            return 0
        if self.spread > 1:
            return 1 if work.experts else 0
        return 2

    @property
    def _wire_bytes(self) -> float:
        return 4.0 if self.kind == "cpu" else 2.0  # gloo sums partial results in fp32

    def host_seconds(self, rows: float) -> float:
        """Seconds of a step outside the model: scheduling, sampling, text."""
        return self._c("step_seconds") + rows * self._c("row_seconds")

    @property
    def request_seconds(self) -> float:
        """Seconds of a request outside the engine: HTTP, tokenising, the first text."""
        return self._c("request_seconds")

    def hop_seconds(self, rows: float) -> float:
        """Seconds to send `rows` to the next stage."""
        if self.pp == 1:
            return 0.0
        far = self.tp * self.pp > self.cluster.domain
        return self.network.point_to_point(rows * self.shape.hidden * self._wire_bytes, far=far)

    def _product(self, parts: dict[str, float], matrix: Matrix, rows: float, count: float) -> None:
        if rows <= 0 or count <= 0:
            return
        element = self.wide_bytes if matrix.whole else self.weight_bytes
        flops, moved = self._flops, self.wide_bytes
        if self.widens and rows >= self.server.widens_rows:
            flops, moved = self._wide_flops, WEIGHT_BYTES["fp32"]
            element += 2 * moved  # written in fp32, and read again
        arithmetic = 2 * rows * matrix.elements / flops
        read = matrix.elements * element + rows * (matrix.inner + matrix.columns) * moved
        self._add(parts, count, arithmetic, read / self._reading, "weights")

    def _experts(self, parts: dict[str, float], work: LayerWork, rows: float, count: float) -> None:
        if rows <= 0:
            return
        missed = (1 - work.top_k / work.experts) ** rows
        touched = work.experts * (1 - missed)
        tiled = rows * work.top_k * work.imbalance + touched * _EXPERT_TILE_ROWS
        arithmetic = 2 * tiled * work.expert_elements / self._flops
        reading = touched * work.expert_elements * self.weight_bytes / self._reading
        self._add(parts, count, arithmetic, reading, "weights")

    def _attend(self, parts: dict[str, float], work: LayerWork, step: Step, count: float) -> None:
        window = self.shape.sliding_window
        if step.rows:
            context = min(step.context, window) if window else step.context
            arithmetic = step.rows * context * work.decode_flops / self._attention
            read = step.rows * context * work.cache_elements * self.cache_bytes
            self._add(parts, count, arithmetic, read / (self._bandwidth * self._c("cache.share")), "cache")
        if step.prompt:
            context = min(step.prompt_context, window) if window else step.prompt_context
            parts["compute"] += count * step.prompt * context * work.read_flops / self._attention

    def _add(self, parts: dict[str, float], count: float, arithmetic: float, reading: float, read_part: str) -> None:
        most, least = max(arithmetic, reading), min(arithmetic, reading)
        if most <= 0:
            return
        whole = most * (1 + (least / most) ** self._exponent) ** (1 / self._exponent)
        parts["compute" if arithmetic > reading else read_part] += count * whole

    def _launch(self, work: LayerWork, rows: float) -> float:
        kernels = self.server.kernels + (self.server.expert_kernels if work.experts else 0)
        each = self._c("kernel_seconds") if self.server.graphs and self.kind == "cuda" else self.device.launch_seconds
        extra = rows * work.key_heads * self._c("pair_seconds") if self.kind == "cpu" else 0.0
        return kernels * each + extra

    def _direct_bytes_per_second(self) -> float:
        """Speed of kernels that write into the memory of other tensor-parallel ranks; 0 without them."""
        link = self.cluster.intra
        quick = link.bytes_per_second >= _DIRECT_BYTES_PER_SECOND and self.group.islands == 1
        return link.bytes_per_second if quick and self.kind == "cuda" and self.server.graphs else 0.0

    def _reduce(self, size_bytes: float) -> float:
        seconds = self.network.all_reduce(size_bytes, self.group)
        if self._direct:
            wire = 2 * size_bytes * (self.tp - 1) / self.tp
            seconds = min(seconds, self._c("reduce_seconds") + 1.5 * wire / self._direct)
        return seconds


def computes(device: Device, precision: str) -> bool:
    """Whether a device can compute with weights of `precision`: fp8 and fp4 need special units, int8 is widened."""
    return precision in device.flops or precision == "int8"
