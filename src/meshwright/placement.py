"""The placement table: per parameter and persistent buffer the mesh axes that split it, a rank's box, its replicas,
and its owner.

`apply`, the optimizer, checkpoints and the engine work from its rows. They follow from names, shapes and logical axes
alone, so any process can compute the rows of any rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from meshwright.card import Card, Parameter
from meshwright.layout import Box, Coordinates, Layout, split_dimension


@dataclass(frozen=True)
class Placement:
    """A rank's part of a parameter or a buffer: one row of the table.

    Values are stored under `name`: for tied parameters, the first's. `replicas` ranks of the world hold exactly `box`,
    and one of these is its `owner`. `split` lists (mesh axis, dimension) in the order of the cuts. The gradient must
    still be summed over the groups in `partial`: "tp", or "ends" (the first and the last pipeline stage, each with a
    copy of a tied weight).
    """

    name: str
    box: Box
    replicas: int
    owner: bool
    split: tuple[tuple[str, int], ...] = ()
    partial: tuple[str, ...] = ()


def placements(
    card: Card, layout: Layout, at: Coordinates, stage: Collection[str] | None = None
) -> dict[str, Placement]:
    """The rows of the rank at `at`, by the name in its module: of parameters, then of persistent buffers.

    `stage` names the blocks of its pipeline stage, None for all. Owners alternate: replica k modulo the number of
    replicas owns parameter k of the stage. The first stage owns a tied weight that two stages hold. Every rank of a
    stage holds its buffers whole, and its first rank owns them all, so that what is saved together comes from one rank.
    """
    mesh = {"replicate": (layout.replicate, at.replicate), "shard": (layout.shard, at.shard), "tp": (layout.tp, at.tp)}
    dims = tensor_split(card) if layout.tp > 1 else {}
    region_paths, stored_as = regions(dims), {alias: name for name, alias in card.tied}
    parameters, tied_apart = _stage_parameters(card, stage)
    rows = {}
    for index, parameter in enumerate(parameters):
        name, box = parameter.name, Box.whole(parameter.shape)
        split = {"tp": dims[name]} if name in dims else {}
        if layout.shard > 1 and parameter.shape:
            split["shard"] = 0  # FSDP2 cuts the rows that tensor parallelism left
        for axis, dim in split.items():
            box = box.split(dim, *mesh[axis])
        replicas, replica = 1, 0
        for axis, (degree, place) in mesh.items():
            if axis not in split:
                replicas, replica = replicas * degree, replica * degree + place
        owner, partial = index % replicas == replica, []
        if (
            layout.tp > 1
            and name not in dims
            and (layout.sequence_parallel or _acts_in_region(name, dims, region_paths))
        ):
            partial.append("tp")  # the rank's gradient is of its part of the sequence, heads or features
        if name in tied_apart and at.pp in (0, layout.pp - 1):
            replicas, owner = 2 * replicas, owner and at.pp == 0
            partial.append("ends")
        rows[name] = Placement(stored_as.get(name, name), box, replicas, owner, tuple(split.items()), tuple(partial))
    replicas, first = math.prod(degree for degree, _ in mesh.values()), not any(place for _, place in mesh.values())
    for block in card.blocks:
        if stage is None or block.name in stage:
            kept = (buffer for buffer in block.buffers if buffer.persistent)
            rows |= {one.name: Placement(one.name, Box.whole(one.shape), replicas, first) for one in kept}
    return rows


def tensor_split(card: Card) -> dict[str, int]:
    """The dimension that tensor parallelism splits, by parameter (aliases too); whole parameters are not in it."""
    dims = {p.name: dim for p in card.parameters if (dim := split_dimension(p.axes)) is not None}
    return dims | {alias: dims[name] for name, alias in card.tied if name in dims}


def regions(dims: Mapping[str, int]) -> frozenset[str]:
    """Paths of the modules, such as an attention, that have a layer split by its output and one split by its input:
    activations are split only between these layers."""
    sides: dict[str, set[int]] = {}
    for name, dim in dims.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight":
            sides.setdefault(layer.rpartition(".")[0], set()).add(dim)
    return frozenset(path for path, split in sides.items() if split >= {0, 1})


def _acts_in_region(name: str, dims: Mapping[str, int], region_paths: Collection[str]) -> bool:
    """Whether a parameter acts inside a region; the bias of the layer that ends one acts on the sum."""
    path = name.split(".")[:-1]
    inside = any(".".join(path[:depth]) in region_paths for depth in range(len(path) + 1))
    return inside and dims.get(".".join([*path, "weight"])) != 1


def _stage_parameters(card: Card, stage: Collection[str] | None) -> tuple[list[Parameter], set[str]]:
    """The parameters of a stage, and the names of tied parameters whose pair is in another stage: there the alias is a
    parameter of its own, the last of its block."""
    if stage is None:
        return list(card.parameters), set()
    blocks = {name: name.split(".")[1] for pair in card.tied for name in pair}
    apart = {alias: name for name, alias in card.tied if (blocks[name] in stage) != (blocks[alias] in stage)}
    table = {parameter.name: parameter for parameter in card.parameters}
    parameters: list[Parameter] = []
    for block in card.blocks:
        if block.name in stage:
            parameters += block.parameters
            parameters += [
                replace(table[name], name=alias) for alias, name in apart.items() if blocks[alias] == block.name
            ]
    return parameters, {*apart, *apart.values()}
