"""A small image classifier for scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes.

    meshwright train examples/digits.toml

Any `nn.Module` works. It can be split into a pipeline because it names its `blocks` and applies them in order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 8  # pixels
CLASSES = 10


class Stem(nn.Module):
    """Pixels [B, 8, 8] or [B, 64], scaled to 0..1 -> feature maps [B, width, 8, 8]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, 1, SIDE, SIDE))


class Residual(nn.Module):
    """A residual 3 x 3 and a 1 x 1 convolution. [B, width, 8, 8] -> the same.

    GroupNorm, not BatchNorm: if a sample's result depended on the others in its batch, every layout would compute
    something else.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.spread = nn.Conv2d(width, 2 * width, kernel_size=3, padding=1)
        self.gather = nn.Conv2d(2 * width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gather(F.gelu(self.spread(self.norm(x))))


class Head(nn.Module):
    """Feature maps [B, width, 8, 8], averaged to 4 x 4 -> logits [B, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.out = nn.Linear(width * (SIDE // 2) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.avg_pool2d(self.norm(x), 2).flatten(1))


class Digits(nn.Module):
    """The blocks in order: "stem", "0" .. "depth-1", "head"."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"stem": Stem(width)})
        for index in range(depth):
            self.blocks[str(index)] = Residual(width)
        self.blocks["head"] = Head(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x

    def sample_input(self) -> Tensor:
        """A batch of one, so that Meshwright can plan without reading the data."""
        return torch.zeros(1, SIDE, SIDE)


def build(width: int = 32, depth: int = 4) -> nn.Module:
    """The factory that `module = "digits:build"` of the job names; its keywords are `arguments`."""
    return Digits(width, depth)
