"""A small image classifier for scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes.

    meshwright train examples/digits.toml

Any `nn.Module` works. Naming its `blocks`, and folding them in `forward`, is what lets it be cut into a pipeline.
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
    """A 3 x 3 convolution and a 1 x 1 one, added to what came in. [B, width, 8, 8] -> the same.

    GroupNorm, not BatchNorm: a sample's result must not depend on which others share its batch, or every layout
    would compute something else.
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
    """What `module = "digits:build"` of the job calls, with `arguments` as keywords."""
    return Digits(width, depth)
