"""A model that is wrong on purpose: what it computes depends on which process it runs in."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn


class Skewed(nn.Module):
    """[B, 8, 8] -> logits [B, 10]; ranks other than the first add an error of size `skew` in the second layer."""

    def __init__(self, skew: float) -> None:
        super().__init__()
        self.first, self.second, self.skew = nn.Linear(64, 16), nn.Linear(16, 10), skew

    def forward(self, x: Tensor) -> Tensor:
        error = self.skew * (os.environ.get("RANK", "0") != "0")
        return self.second(torch.tanh(self.first(x.flatten(1)))) * (1.0 + error)

    def sample_input(self) -> Tensor:
        return torch.zeros(1, 8, 8)


class Dropped(Skewed):
    """With dropout between the layers."""

    def __init__(self, share: float) -> None:
        super().__init__(0.0)
        self.drop = nn.Dropout(share)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(x.flatten(1)))))


class Noisy(Skewed):
    """Draws random numbers that are no dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1))) + 0.1 * torch.randn(16))


def dropped(skew: float) -> nn.Module:
    return Dropped(skew)


def noisy() -> nn.Module:
    return Noisy(0.0)


def build(skew: float = 0.0) -> nn.Module:
    return Skewed(skew)
