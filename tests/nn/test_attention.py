from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.nn import Attention, Rotary


def slow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, a head and a query at a time. q [B, T, H, D], k and v [B, T, K, D]."""
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                keys, values = k[b, : t + 1, h // groups], v[b, : t + 1, h // groups]
                out[b, t, h] = torch.softmax(keys @ q[b, t, h] / math.sqrt(dim), dim=0) @ values
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_an_explicit_softmax(heads: int, kv_heads: int) -> None:
    torch.manual_seed(heads)
    q = torch.randn(2, 7, heads, 8, requires_grad=True)
    k, v = (torch.randn(2, 7, kv_heads, 8, requires_grad=True) for _ in range(2))
    positions = torch.arange(7).expand(2, -1)
    found, expected = Attention()(q, k, v, positions), slow_attention(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for one, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


_YARN: dict[str, Any] = {"rope_type": "yarn", "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, every key": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
    },
    "yarn, weighed": {**_YARN, "factor": 16.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, weighed equally": {**_YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, one weight": {**_YARN, "factor": 16.0, "mscale": 0.707},
    "yarn, no longer": {**_YARN, "factor": 1.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn, shorter": {**_YARN, "factor": 0.99},
    "yarn, not truncated": {**_YARN, "factor": 4.0, "truncate": False},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_equals_transformers(scaling: dict[str, Any] | None, theta: float) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": theta, **(scaling or {})}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_theta=theta, rope_parameters=rope
    )
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 2, 32), torch.randn(2, 50, 1, 32)
    positions = torch.stack((torch.arange(50), torch.arange(150, 200)))
    cos, sin = modeling.LlamaRotaryEmbedding(config)(q, positions)
    expected = modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    found = Rotary(32, theta, scaling, 256)(q, k, positions)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.transpose(1, 2), rtol=1e-5, atol=1e-4)


def test_rotary_comes_back_from_the_meta_device() -> None:
    plain = Rotary(16, 10_000.0, None, 128)
    with torch.device("meta"):
        meta = Rotary(16, 10_000.0, None, 128)
    meta.to_empty(device="cpu")
    meta.reset_buffers()
    torch.testing.assert_close(meta.inv_freq, plain.inv_freq, rtol=0, atol=0)


def test_rotary_depends_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    rotary = Rotary(16, 10_000.0, None, 512)

    def product(query_at: int, key_at: int) -> float:
        turned_q = rotary(q, q, torch.tensor([[query_at]]))[0]
        turned_k = rotary(k, k, torch.tensor([[key_at]]))[0]
        return float((turned_q * turned_k).sum())

    assert product(9, 4) == pytest.approx(product(309, 304), abs=1e-4)
