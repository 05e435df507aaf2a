"""Llama, Mistral, Qwen2 and Qwen3 as one plain module, without meshes, ranks or wrappers."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.families.llama.card import LlamaShape
from meshwright.nn import Attention, Rotary


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions. x [B, T, hidden] -> [B, T, hidden].

    The number of heads follows from the projections' outputs, so a slice of the heads works unchanged.
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q = nn.Linear(shape.hidden, wide, bias=shape.bias("qkv"))
        self.k = nn.Linear(shape.hidden, narrow, bias=shape.bias("qkv"))
        self.v = nn.Linear(shape.hidden, narrow, bias=shape.bias("qkv"))
        self.o = nn.Linear(wide, shape.hidden, bias=shape.bias("out"))
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.rotary = Rotary(shape.head_dim, shape.rope_theta, shape.rope_scaling, shape.max_positions)
        self.attend = Attention()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        q, k = self.rotary(q, k, positions)
        return self.o(self.attend(q, k, v, positions).flatten(-2))


class FeedForward(nn.Module):
    """Gated feed-forward, silu(gate(x)) * up(x) -> down. x [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream. x [B, T, hidden]."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.attn = SelfAttention(shape)
        self.ffn_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), positions)
        return x + self.ffn(self.ffn_norm(x))


class Embed(nn.Embedding):
    """Token ids [B, T] -> [B, T, hidden]."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Head(nn.Module):
    """Final norm and projection to the vocabulary: [B, T, hidden] -> logits [B, T, vocab]."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.out = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Llama(nn.Module):
    """The whole model: token ids [B, T] and positions [B, T] -> logits [B, T, vocab], folding `blocks` in order."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        embed, head = Embed(shape.vocab, shape.hidden), Head(shape)
        layers = {str(index): Layer(shape) for index in range(shape.layers)}
        self.blocks = nn.ModuleDict({"embed": embed, **layers, "head": head})
        if shape.tied:
            head.out.weight = embed.weight
        self.layers = shape.layers

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x, positions=positions)
        return x

    def init_rule(self, name: str) -> tuple[str, float]:
        """How parameter `name` starts: ("normal", standard deviation) or ("constant", value).

        GPT-2's rule: 0.02, and 0.02 / sqrt(2 x layers) for products added to the residual stream.
        """
        if "norm.weight" in name:
            return "constant", 1.0
        if name.endswith(".bias"):
            return "constant", 0.0
        into_residual = name.endswith((".attn.o.weight", ".ffn.down.weight"))
        return "normal", 0.02 / math.sqrt(2 * self.layers) if into_residual else 0.02


def build(shape: LlamaShape) -> Llama:
    """The module for `shape`; under `torch.device("meta")` it takes no memory."""
    return Llama(shape)
