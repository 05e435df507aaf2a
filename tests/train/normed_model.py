"""A classifier of digits with state beside its parameters: running statistics, a count, and a buffer that is not
saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Body(nn.Module):
    """Pixels [B, 8, 8] -> [B, width, 8, 8]. Its norm looks at the batch, and it counts its training batches by a tensor
    that it replaces each time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int32))
        self.register_buffer("scale", torch.full((width, 1, 1), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        return torch.tanh(self.norm(self.inner(x[:, None]))) * self.scale


class Head(nn.Module):
    """[B, width, 8, 8] -> logits [B, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(width), nn.Linear(width * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).flatten(1))


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"body": Body(width), "head": Head(width)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x

    def sample_input(self) -> Tensor:
        return torch.zeros(1, 8, 8)


def build(width: int = 4) -> nn.Module:
    return Model(width)
