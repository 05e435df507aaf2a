"""Times the parts of a training step on one device: products, attention, memory-bound chains, the loss, copies, AdamW,
and the overhead of FSDP2 and of checkpointing. Every function returns rows of plain figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from meshwright.nn import Attention, Rotary, cross_entropy_sum

MIB = 1024**2
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: (rows, inner, columns) of products: tokens x width x width of blocks of small (CPU) and large (GPU) models.
PRODUCTS = {
    "cpu": ((64, 512, 512), (128, 768, 768), (256, 256, 1024), (512, 512, 1408), (1024, 512, 512), (2048, 384, 1024)),
    "cuda": ((2048, 1024, 1024), (4096, 2048, 2048), (4096, 4096, 4096), (8192, 4096, 11008), (16384, 4096, 4096)),
}
#: (batch, length, heads, key heads, head width) of attention.
ATTENTION = {
    "cpu": ((4, 128, 4, 4, 32), (2, 256, 8, 4, 64), (1, 1024, 4, 4, 64)),
    "cuda": ((4, 2048, 16, 16, 64), (2, 4096, 32, 8, 128), (1, 8192, 32, 8, 128)),
}
#: (width, gated width, bytes of the gated tensor) of the memory-bound chain, and (rows, vocabulary) of the loss: one
#: size that fits a core's caches, and one that does not.
CHAINS = {"cpu": ((384, 1024, MIB), (384, 1024, 8 * MIB)), "cuda": ((2048, 5632, 88 * MIB), (4096, 11008, 344 * MIB))}
LOSSES = {"cpu": ((512, 2048), (256, 16384)), "cuda": ((8192, 32000), (4096, 128256))}
#: Parameters of AdamW, in 16 matrices, and the width of the layers that FSDP2 wraps.
OPTIMIZER_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
SHARDED_WIDTH = {"cpu": 1024, "cuda": 4096}
READ_MIB = {"cpu": 128, "cuda": 1024}
LAYERS, TOKENS = 3, 8


@dataclass(frozen=True)
class Bench:
    """How to time on a device. `allowance()` is the wall time for the next measurement with its warm-ups; `barrier()`
    makes all ranks start it together. `clock` is processor time for a process of one thread, so that other work on the
    machine does not count, else wall time. `typical` picks the result from the repeats. `spent` collects the seconds of
    each measurement on a CPU: of its processors that it got, and that it wanted."""

    device: torch.device
    allowance: Callable[[], float]
    barrier: Callable[[], None]
    clock: Callable[[], float] = time.perf_counter
    typical: Callable[[list[float]], float] = statistics.median
    spent: list[tuple[float, float]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.device.type

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], least: int = 3) -> float:
        """Typical time of `work` after two warm-ups, from repeats within the allowance: at least `least`, or one where
        no time is left."""
        allowed = self.allowance()
        until, least = time.perf_counter() + allowed, least if allowed > 0 else 1
        work()
        work()
        self.synchronize()
        self.barrier()
        times: list[float] = []
        began, own = time.perf_counter(), time.process_time()
        while len(times) < least or time.perf_counter() < until:
            start = self.clock()
            work()
            self.synchronize()
            times.append(self.clock() - start)
        if self.kind == "cpu":
            wall = (time.perf_counter() - began) * torch.get_num_threads()
            self.spent.append((time.process_time() - own, wall))
        return self.typical(times)

    def processors(self) -> float:
        """The share of its processors that this process got in all measurements together; 1 on a GPU. Not that of a
        typical measurement: a short one may end before the system lets another process run."""
        got, wanted = (sum(column) for column in zip(*self.spent or [(1.0, 1.0)], strict=True))
        return got / wanted


def timings(kind: str, whole: bool) -> int:
    """The number of measurements of all parts, or without `whole` of products and chains."""
    count = 3 * len(PRODUCTS[kind]) + 2 * len(CHAINS[kind])
    if whole:
        count += 2 * len(ATTENTION[kind]) + len(LOSSES[kind]) + 1 + 2 * 4  # memory and AdamW; layers of two widths
    return len(PRECISIONS) * count


def products(bench: Bench) -> list[dict[str, Any]]:
    """Forward, input gradient and weight gradient, each as autograd computes it."""
    rows = []
    for precision, dtype in PRECISIONS.items():
        for size in PRODUCTS[bench.kind]:
            x, w, dy = (torch.randn(*shape, device=bench.device).to(dtype) for shape in _shapes(*size))
            rows.append(
                {
                    "precision": precision,
                    "rows": size[0],
                    "inner": size[1],
                    "columns": size[2],
                    "forward": bench.seconds(partial(torch.mm, x, w.t())),
                    "input_gradient": bench.seconds(partial(torch.mm, dy, w)),
                    "weight_gradient": bench.seconds(partial(torch.mm, dy.t(), x)),
                }
            )
    return rows


def _shapes(rows: int, inner: int, columns: int) -> tuple[tuple[int, int], ...]:
    return (rows, inner), (columns, inner), (rows, columns)


def attention(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward of nn.Attention."""
    rows, attend = [], Attention()
    for precision, dtype in PRECISIONS.items():
        for batch, length, heads, kv_heads, width in ATTENTION[bench.kind]:
            q = torch.randn(batch, length, heads, width, device=bench.device).to(dtype).requires_grad_()
            k, v = (
                torch.randn(batch, length, kv_heads, width, device=bench.device).to(dtype).requires_grad_()
                for _ in range(2)
            )
            positions = torch.arange(length, device=bench.device).expand(batch, -1)
            rows.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "length": length,
                    "heads": heads,
                    "width": width,
                    **_passes(bench, partial(attend, q, k, v, positions), (q, k, v)),
                }
            )
    return rows


def _passes(bench: Bench, work: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of the forward pass with its graph, and what the backward pass adds."""
    upstream = torch.ones_like(work())
    both = bench.seconds(lambda: torch.autograd.grad(work(), leaves, upstream))
    forward = bench.seconds(work)
    return {"forward": forward, "backward": max(both - forward, 0.1 * both)}


def chains(bench: Bench) -> list[dict[str, Any]]:
    """The memory-bound part of a transformer layer: two norms and residuals, rotary positions, a gated product. `moved`
    counts elements as the cards of families do: 8 x width + 4 x (queries and keys) + 6 x gated width per token."""
    rows = []
    for precision, dtype in PRECISIONS.items():
        for width, gated, size in CHAINS[bench.kind]:
            tokens = size // (gated * dtype.itemsize)
            rotary = Rotary(64, 10000.0, None, tokens).to(bench.device)
            positions = torch.arange(tokens, device=bench.device)[None]
            x, scale = (torch.randn(*s, device=bench.device).to(dtype) for s in ((1, tokens, width), (width,)))
            a, b = (torch.randn(1, tokens, gated, device=bench.device).to(dtype) for _ in range(2))
            leaves = tuple(t.requires_grad_() for t in (x, scale, a, b))

            moved = tokens * (8 * width + 8 * width + 6 * gated)
            rows.append(
                {
                    "precision": precision,
                    "bytes": size,
                    "moved": moved,
                    **_passes(bench, partial(_chain, rotary, positions, *leaves), leaves),
                }
            )
    return rows


def _chain(rotary: Rotary, positions: Tensor, x: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = x + F.rms_norm(x, scale.shape, scale)
    q, k = rotary(y.unflatten(-1, (-1, 64)), x.unflatten(-1, (-1, 64)), positions)
    z = F.silu(a) * b
    return (y + F.rms_norm(q.flatten(2) + k.flatten(2), scale.shape, scale)).sum() + z.sum()


def losses(bench: Bench) -> list[dict[str, Any]]:
    """nn.cross_entropy_sum, forward and backward."""
    rows = []
    for precision, dtype in PRECISIONS.items():
        for count, vocab in LOSSES[bench.kind]:
            logits = torch.randn(count, vocab, device=bench.device).to(dtype).requires_grad_()
            targets = torch.randint(0, vocab, (count,), device=bench.device)
            seconds = bench.seconds(partial(_loss, logits, targets))
            rows.append({"precision": precision, "logits": count * vocab, "seconds": seconds})
    return rows


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.autograd.grad(cross_entropy_sum(logits, targets), logits)[0]


def memory(bench: Bench) -> float:
    """Bytes per second of reading more memory than the caches hold."""
    data = torch.ones(READ_MIB[bench.kind] * MIB // 4, device=bench.device)
    return READ_MIB[bench.kind] * MIB / bench.seconds(data.sum)


def optimizer(bench: Bench) -> dict[str, float]:
    """Seconds of the gradient norm, the clipping and fused AdamW over `elements` parameters."""
    elements = OPTIMIZER_ELEMENTS[bench.kind]
    weights = [torch.zeros(elements // 16, device=bench.device) for _ in range(16)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adamw = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    gradients = [weight.grad for weight in weights if weight.grad is not None]

    def work() -> None:
        torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, 0.999)
        adamw.step()

    return {"elements": elements, "seconds": bench.seconds(work)}


class _TransformerLayer(nn.Module):
    """A transformer layer of seven matrices and two norms, as in `families`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            nn.Linear(width, width, bias=False) for _ in range(7)
        )
        self.rotary, self.attend, self.head = Rotary(width // 2, 10000.0, None, TOKENS), Attention(), width // 2

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (into(y).unflatten(-1, (-1, self.head)) for into in (self.q, self.k, self.v))
        q, k = self.rotary(q, k, positions)
        x = x + self.o(self.attend(q, k, v, positions).flatten(-2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def layers(bench: Bench, mesh: DeviceMesh) -> list[dict[str, Any]]:
    """Seconds per layer, of tiny and of wide layers on a few tokens: the forward pass, and forward and backward with
    gradient accumulation of layers that are `plain`, `checkpointed`, and `sharded` by FSDP2 over a group of one rank.
    The tiny layers show the host's work, the wide ones FSDP2's copies."""
    rows = []
    for precision, dtype in PRECISIONS.items():
        for width in (16, SHARDED_WIDTH[bench.kind]):
            plain = nn.ModuleList(_TransformerLayer(width) for _ in range(LAYERS)).to(bench.device, dtype)
            x = torch.ones(1, TOKENS, width, device=bench.device, dtype=dtype)
            positions = torch.arange(TOKENS, device=bench.device)[None]
            sharded = _sharded(width, precision, bench, mesh)
            calls: dict[str, Callable[[], Any]] = {
                "forward": partial(_forward, plain, x, positions),
                "plain": partial(_forward_backward, plain, x, positions),
                "checkpointed": partial(_forward_backward, plain, x, positions, recompute=True),
                "sharded": partial(_forward_backward, sharded, x, positions),
            }
            times = {name: bench.seconds(call, 5) / LAYERS for name, call in calls.items()}
            rows.append({"precision": precision, "elements": 7 * width * width, **times})
    return rows


def _forward(layers: nn.ModuleList, x: Tensor, positions: Tensor, recompute: bool = False) -> Tensor:
    for layer in layers:
        x = checkpoint(layer, x, positions, use_reentrant=False) if recompute else layer(x, positions)
    return x


def _forward_backward(layers: nn.ModuleList, x: Tensor, positions: Tensor, recompute: bool = False) -> None:
    """Forward and backward of one micro-batch; gradients accumulate over calls."""
    _forward(layers, x, positions, recompute).sum().backward()


def _sharded(width: int, precision: str, bench: Bench, mesh: DeviceMesh) -> nn.ModuleList:
    layers = nn.ModuleList(_TransformerLayer(width) for _ in range(LAYERS)).to(bench.device)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": False}
    if precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, **options).set_requires_gradient_sync(False)
    return layers


def one_rank_mesh(kind: str) -> DeviceMesh:
    """A mesh of this process alone, in a world of any size. All ranks must call it."""
    world = dist.get_world_size()
    mesh = DeviceMesh(kind, torch.arange(world).view(world, 1), mesh_dim_names=("ranks", "one"))
    return mesh["one"]
