"""Blocked attention against its slow twin, torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.nn import Attention
from meshwright.nn.blocked import KEPT_LENGTH, QUERIES_AT_ONCE, blocked_attention

LENGTHS = (1, QUERIES_AT_ONCE - 1, QUERIES_AT_ONCE, QUERIES_AT_ONCE + 1, 300, KEPT_LENGTH, KEPT_LENGTH + 70)


def twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)


def inputs(length: int, heads: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, heads, 8), (2, length, kv_heads, 8), (2, length, kv_heads, 8))
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_outputs_and_gradients_are_the_twins(length: int, heads: int, kv_heads: int) -> None:
    tensors = inputs(length, heads, kv_heads)
    expected, found = twin(*tensors), blocked_attention(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(found, tensors, slope), torch.autograd.grad(expected, tensors, slope), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bf16_on_a_cpu_takes_it_and_stays_as_near_as_the_twin() -> None:
    tensors = inputs(300, 4, 2)
    exact = twin(*tensors)
    rounded = [tensor.detach().bfloat16() for tensor in tensors]
    found = Attention()(*rounded, torch.arange(300).expand(2, -1))
    assert torch.equal(found, blocked_attention(*rounded))
    error, usual = ((x.float() - exact).norm() / exact.norm() for x in (found, twin(*rounded)))
    assert error < max(2 * usual, torch.tensor(1e-2))
