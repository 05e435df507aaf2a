"""How a model is split over devices: the Layout, the table of logical axes, and the boxes of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

RECOMPUTE = ("none", "selective", "full")
#: Orders of work of a pipeline (`plan/pipeline/actions.py`); `plan/rules/frameworks.py` says which a framework runs.
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zbv", "dualpipev")

#: Logical axis of a parameter's dimension -> mesh axis that splits it, or None. `placement.py` works from this table,
#: and `meshwright plan --layout-table` prints it.
AXIS_RULES: dict[str, str | None] = {
    "vocab": "tp",  # token embedding and output head
    "heads": "tp",  # query heads x head_dim
    "kv_heads": "tp",  # key and value heads x head_dim
    "ffn": "tp",  # feed-forward width
    "expert": "ep",  # experts of a mixture
    "expert_ffn": "tp",  # feed-forward width of one expert
    "embed": None,  # the residual stream
    "latent": None,  # low-rank queries, keys and values
    "positions": None,  # learned positions
    "head_dim": None,  # per-head norms
}


def split_dimension(axes: tuple[str | None, ...]) -> int | None:
    """The dimension of a parameter with these logical axes that tensor parallelism splits, None for none."""
    return next((dim for dim, axis in enumerate(axes) if axis is not None and AXIS_RULES[axis] == "tp"), None)


@dataclass(frozen=True)
class Layout:
    """How the work is split. devices = dp x tp x pp x cp.

    `dp` is the total data-parallel degree. `shard` (FSDP degree) divides dp x cp: 1 is replicated, dp x cp fully
    sharded, any other degree hybrid. `ep` divides dp x cp; `vpp` counts virtual stages per rank; `micro_batch` is in
    samples; `offload` keeps optimizer state in host memory.
    """

    dp: int = 1
    shard: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    offload: bool = False

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def replicate(self) -> int:
        """Groups that hold equal shards: dp x cp / shard."""
        return self.dp * self.cp // self.shard

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches that one data-parallel rank runs per step."""
        return global_batch // (self.dp * self.micro_batch)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        """Short name: the degrees above one ("1 device" for none), then settings other than the default."""
        words = [f"{name}{getattr(self, name)}" for name in ("dp", "tp", "pp", "cp", "ep") if getattr(self, name) > 1]
        if self.shard > 1:
            words.append(f"shard{self.shard}")
        if self.vpp > 1:
            words.append(f"vpp{self.vpp}")
        if self.sequence_parallel:
            words.append("sp")
        if self.pp > 1:
            words.append(self.schedule)
        if self.recompute != "none":
            words.append(f"recompute={self.recompute}")
        if self.offload:
            words.append("offload")
        return " ".join([*(words or ["1 device"]), f"micro{self.micro_batch}"])


@dataclass(frozen=True)
class Execution:
    """How a model is run: its layout, the names of each pipeline stage's blocks, the precision, whether compiled."""

    layout: Layout
    stages: tuple[tuple[str, ...], ...]
    precision: str
    compiled: bool = False


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in the mesh. Rank order is pp (outermost), dp replicate, dp shard, cp, tp (innermost)."""

    pp: int
    replicate: int
    shard: int
    cp: int
    tp: int

    def dp(self, layout: Layout) -> int:
        """Index among the `layout.dp` data-parallel ranks: which samples of a batch are this rank's."""
        return (self.replicate * layout.shard + self.shard) // layout.cp


def coordinates(layout: Layout, rank: int) -> Coordinates:
    """Coordinates of `rank` (0 <= rank < layout.devices); tensor-parallel neighbours have adjacent ranks."""
    if not 0 <= rank < layout.devices:
        raise ValueError(f"rank {rank} is outside a layout of {layout.devices} devices")
    rest, tp = divmod(rank, layout.tp)
    # shard spans dp x cp, so the data axis here has dp*cp entries, of which the inner `cp` share samples.
    pp, data = divmod(rest, layout.dp * layout.cp)
    replicate, shard = divmod(data, layout.shard)
    return Coordinates(pp=pp, replicate=replicate, shard=shard, cp=data % layout.cp, tp=tp)


@dataclass(frozen=True)
class Box:
    """One rank's part of a global tensor: `shape` elements from `start` on, in each dimension."""

    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, None if there are none. Raises ValueError if the tensors differ in shape."""
        if self.global_shape != other.global_shape:
            raise ValueError(f"boxes of different tensors: {self.global_shape} and {other.global_shape}")
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return None if any(size <= 0 for size in shape) else Box(self.global_shape, start, shape)

    def split(self, dim: int, parts: int, index: int) -> Box:
        """Part `index` of `parts` along `dim`, as torch.chunk: ceil-sized parts, the last ones may be empty."""
        size = self.shape[dim]
        step = -(-size // parts)
        low, high = min(index * step, size), min((index + 1) * step, size)
        start = tuple(s + low if d == dim else s for d, s in enumerate(self.start))
        shape = tuple(high - low if d == dim else n for d, n in enumerate(self.shape))
        return Box(self.global_shape, start, shape)

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box(tuple(shape), (0,) * len(shape), tuple(shape))
