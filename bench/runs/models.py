"""The models and layouts that `bench.runs` measures, with steps of 0.1 to 1.5 s on two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.layout import Layout

#: Model -> (the [model] section, seq_len, sequences or samples per step).
MODELS: Mapping[str, tuple[Mapping[str, Any], int, int]] = {
    "wide": ({"family": "llama", "layers": 4, "hidden": 512, "heads": 8, "ffn": 1408, "vocab": 2048}, 256, 4),
    "narrow": (
        {
            "family": "llama",
            "layers": 12,
            "hidden": 192,
            "heads": 6,
            "ffn": 512,
            "vocab": 16384,
            "tied_embeddings": True,
        },
        128,
        8,
    ),
    "grouped": (
        {
            "family": "llama",
            "layers": 4,
            "hidden": 384,
            "heads": 8,
            "kv_heads": 2,
            "head_dim": 64,
            "ffn": 1024,
            "vocab": 4096,
            "qk_norm": True,
        },
        512,
        4,
    ),
    "own": ({"module": "bench.runs.models:build"}, 1, 32),
}


@dataclass(frozen=True)
class Run:
    """One measured run: a layout of a model in a precision."""

    layout: Layout
    precision: str

    @property
    def name(self) -> str:
        return f"{self.layout} {self.precision}"


def runs(model: str) -> tuple[Run, ...]:
    """The runs of a model."""
    b = MODELS[model][2]
    one = [{"micro_batch": b}, {"micro_batch": b // 4}, {"micro_batch": b // 2, "recompute": "full"}]
    data = [
        {"dp": 2, "micro_batch": b // 2},
        {"dp": 2, "micro_batch": b // 4, "recompute": "selective"},
        {"dp": 2, "shard": 2, "micro_batch": b // 2},
        {"dp": 2, "shard": 2, "micro_batch": b // 4, "recompute": "full"},
    ]
    stages = [
        {"pp": 2, "micro_batch": b // 4, "schedule": "gpipe"},
        {"pp": 2, "micro_batch": b // 4, "schedule": "1f1b"},
        {"pp": 2, "micro_batch": b // 2, "schedule": "1f1b", "recompute": "full"},
    ]
    tensor = [
        {"tp": 2, "micro_batch": b},
        {"tp": 2, "micro_batch": b // 2, "recompute": "full"},
        {"tp": 2, "sequence_parallel": True, "micro_batch": b // 2},
    ]
    if model == "own":
        layouts = [one[0], one[1], *data[:3], stages[0], stages[1], tensor[0], tensor[1]]
        other = [one[0], data[0], stages[1]]
    else:
        layouts = [*one, *data, *stages, *tensor]
        other = [one[0], data[0], data[2], stages[1], tensor[0], tensor[2]]
    main, second = ("bf16", "fp32") if model != "narrow" else ("fp32", "bf16")
    choices = [(fields, main) for fields in layouts] + [(fields, second) for fields in other]
    return tuple(Run(Layout(**fields), precision) for fields, precision in choices)  # type: ignore[arg-type]


class Mix(nn.Module):
    """An MLP-mixer's layer (arXiv 2105.01601): one product over places, two over channels. x [B, places, width]."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Linear(places, places)
        self.channels = Channels(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class Channels(nn.Module):
    """width -> 4 width -> width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Pool(nn.Module):
    """Mean over places, then classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mean(dim=1))


class Mixer(nn.Module):
    """A custom classifier: no attention, layer norms, biases, and a table for tensor parallelism."""

    def __init__(self, places: int = 128, features: int = 48, width: int = 320, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"stem": nn.Linear(features, width)})
        for index in range(depth):
            self.blocks[str(index)] = Mix(places, width)
        self.blocks["head"] = Pool(width, 10)
        self.shape = (places, features)
        self.parameter_axes = {}
        for index in range(depth):
            at = f"blocks.{index}.channels."
            self.parameter_axes |= {
                at + "up.weight": ("ffn", "embed"),
                at + "up.bias": ("ffn",),
                at + "down.weight": ("embed", "ffn"),
            }

    def sample_input(self) -> Tensor:
        return torch.zeros(1, *self.shape)

    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


def build() -> nn.Module:
    """The factory that the job names."""
    return Mixer()
