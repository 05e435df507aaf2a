"""Blocked attention beside torch's fused CPU kernel: bf16, forward and backward, one thread, milliseconds of CPU time.

python bench/speed/attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.nn.blocked import blocked_attention

ROUNDS = 9


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def milliseconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> float:
    start = time.process_time()
    out = attention(*tensors)
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    return (time.process_time() - start) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    print("| batch, length, heads, key heads, width | torch's kernel | blocked | ratio |\n|---|---|---|---|")
    for batch, length, heads, kv_heads, width in ((4, 512, 8, 8, 64), (4, 512, 8, 2, 64), (1, 2048, 8, 8, 64)):
        shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
        tensors = [torch.randn(*shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
        rounds = [(milliseconds(fused, tensors), milliseconds(blocked_attention, tensors)) for _ in range(ROUNDS)]
        slow, fast = (statistics.median(side) for side in zip(*rounds[1:], strict=True))
        print(f"| {batch}, {length}, {heads}, {kv_heads}, {width} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f} |")


if __name__ == "__main__":
    main()
