"""The process mesh of a layout: the groups of ranks that communicate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshwright.launch import Context
from meshwright.layout import Coordinates, Layout, coordinates
from meshwright.nn import backend, take_device
from meshwright.process_group import USUAL_TIMEOUT_SECONDS, process_group


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the running layout. Dimensions from outside in: pp, replicate, shard, tp."""

    layout: Layout
    rank: int
    device: torch.device
    at: Coordinates
    dims: DeviceMesh
    ends: dist.ProcessGroup | None  # first and last pipeline stage of the same column, for tied embeddings

    @property
    def data(self) -> DeviceMesh:
        """The mesh that data parallelism shards and replicates over."""
        if self.layout.replicate == 1:
            return self.dims["shard"]
        return self.dims["replicate", "shard"]

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.dims.get_group("tp")

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.dims.get_group("pp")

    @property
    def first_stage(self) -> bool:
        return self.at.pp == 0

    @property
    def last_stage(self) -> bool:
        return self.at.pp == self.layout.pp - 1

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over every rank, in place."""
        if self.layout.devices > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def start(
    layout: Layout, context: Context, *, timeout_seconds: float = USUAL_TIMEOUT_SECONDS, name: str = ""
) -> Iterator[Mesh]:
    """Joins the ranks of `context`, of which there are as many as `layout` has devices, and yields this rank's Mesh.

    NCCL where there are GPUs, gloo otherwise. The group is destroyed on exit. A missing rank or a stalled collective
    raises after `timeout_seconds`. `name` tells apart the meshes that the same ranks start one after another.
    """
    device = take_device(context.device)
    with process_group(context, backend(device), timeout_seconds=timeout_seconds, name=name):
        yield _mesh(layout, context.rank, device)


@contextmanager
def fake_mesh(layout: Layout, rank: int) -> Iterator[Mesh]:
    """The Mesh of `rank` in `layout` without the other processes: torch's fake process group, on the CPU.

    Collectives return at once and leave their outputs unchanged. For rehearsals of any world size.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend in older torch

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.devices)
    try:
        yield _mesh(layout, rank, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _mesh(layout: Layout, rank: int, device: torch.device) -> Mesh:
    shape = (layout.pp, layout.replicate, layout.shard, layout.tp)
    dims = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "replicate", "shard", "tp"))
    return Mesh(layout, rank, device, coordinates(layout, rank), dims, _ends(layout, rank))


def _ends(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """The group of this rank's pipeline ends. Torch demands that every rank makes every group, in the same order."""
    if layout.pp == 1:
        return None
    column = layout.devices // layout.pp
    mine = None
    for first in range(column):
        members = [first, first + (layout.pp - 1) * column]
        group = dist.new_group(members)
        if rank in members:
            mine = group
    return mine
