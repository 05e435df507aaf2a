"""The attention seam, and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.nn.blocked import blocked_attention


class Attention(nn.Module):
    """Causal softmax attention over whole sequences: the seam that the engine and context parallelism replace.

    q is [B, T, H, D], k and v are [B, T, K, D] with H a multiple of K (grouped-query); returns [B, T, H, D].
    `positions` [B, T] is unused here because a training sample has all its keys, in order; a replacement with a part
    or a cache of the keys masks by it. bf16 on a CPU is computed in blocks (blocked.py), the rest by torch's fused
    kernels.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return blocked_attention(q, k, v)
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return out.transpose(1, 2)


class Rotary(nn.Module):
    """Rotary positions (RoFormer, arXiv 2104.09864) in the half-split order of Hugging Face's Llama.

    `scaling` is a Hugging Face rope table with `rope_type` linear, llama3 or yarn, or None.
    Turns [B, T, H, D] by `positions` [B, T]; the angles are computed in fp32.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_positions: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling, self.max_positions = head_dim, theta, scaling, max_positions
        self.register_buffer("inv_freq", self._frequencies(), persistent=False)

    def reset_buffers(self) -> None:
        """Compute the buffer anew, after the module came from the meta device."""
        self.inv_freq = self._frequencies().to(self.inv_freq.device)

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin: 1, but for yarn (arXiv 2309.00071, section 3.4)."""
        if not self.scaling or self.scaling["rope_type"] != "yarn":
            return 1.0
        if given := self.scaling.get("attention_factor"):
            return float(given)
        # As DeepSeek's tables have them: weights of the logarithm, one over the other, where both are given.
        over, under = self.scaling.get("mscale") or 0.0, self.scaling.get("mscale_all_dim") or 0.0
        if not (over and under):
            over, under = 1.0, 0.0
        longer = 0.1 * math.log(max(1.0, float(self.scaling["factor"])))
        return float((over * longer + 1.0) / (under * longer + 1.0))

    def _frequencies(self) -> Tensor:
        with torch.device("cpu"):
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
            plain = 1.0 / (self.theta**steps)
            if not self.scaling:
                return plain
            kind, factor = self.scaling["rope_type"], float(self.scaling["factor"])
            if kind == "linear":
                return plain / factor
            original = self.scaling.get("original_max_position_embeddings") or self.max_positions
            return self._llama3(plain, factor, original) if kind == "llama3" else self._yarn(plain, factor, original)

    def _llama3(self, plain: Tensor, factor: float, original: int) -> Tensor:
        """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
        assert self.scaling is not None
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        wavelength = 2 * math.pi / plain
        keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * plain / factor + keep * plain

    def _yarn(self, plain: Tensor, factor: float, original: int) -> Tensor:
        """YaRN: dimensions that turn often keep their frequency, slow ones are interpolated (arXiv 2309.00071)."""
        assert self.scaling is not None

        def dimension(turns: float) -> float:
            return self.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.scaling.get("beta_fast") or 32.0), dimension(self.scaling.get("beta_slow") or 1.0)
        if self.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        ramp = ((torch.arange(self.head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain / factor * ramp + plain * (1 - ramp)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
        cos, sin = (angles.cos() * self.amplitude).to(q.dtype), (angles.sin() * self.amplitude).to(q.dtype)
        return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
