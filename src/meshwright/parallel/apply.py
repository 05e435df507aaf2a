"""`apply`: a plain module and a Layout become this rank's part, ready to train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshwright.layout import Box, Layout, Piece
from meshwright.nn import Split
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.tensor import Region, TensorSplit, split_module

#: Gives the values of a parameter's box: (name, box) -> tensor of box.shape.
Source = Callable[[str, Box], Tensor]

#: Kept by selective recompute: matrix products and attention, the operations dear to repeat, and what was communicated.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


@dataclass(frozen=True)
class Applied:
    """This rank's part of a model.

    `pieces` says what it holds of each parameter; `local(name)` is that part as a plain tensor sharing storage with
    the parameter. `partial` names parameters whose gradients must be summed over tensor-parallel ranks, `tied_ends`
    the one whose gradient must be summed over the first and last stage. `output` is how the output is split.
    """

    module: nn.Module
    pieces: Mapping[str, Piece]
    partial: frozenset[str]
    tied_ends: str | None
    output: Split | None

    def local(self, name: str) -> Tensor:
        return _local(self._parameters[name])

    def local_gradient(self, name: str) -> Tensor | None:
        gradient = self._parameters[name].grad
        return None if gradient is None else _local(gradient)

    @functools.cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def fill(self, source: Source, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Sets every parameter from `source`, and buffers by name or by their module's own `reset_buffers`."""
        for name, piece in self.pieces.items():
            if piece.box.elements:
                self.local(name).copy_(source(piece.name, piece.box))
        for child in self.module.modules():
            reset = getattr(child, "reset_buffers", None)
            if callable(reset):
                reset()
        for name, buffer in self.module.named_buffers():
            if buffers and name in buffers:
                buffer.copy_(buffers[name])

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward pass reduces gradients over the data-parallel ranks, or only accumulates."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(now)


class Stage(nn.Module):
    """A contiguous part of a model's `blocks`, under their own names, folded in order."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(dict(blocks))

    def forward(self, x: Tensor, **inputs: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x, **inputs)
        return x


def apply(
    layout: Layout,
    module: nn.Module,
    mesh: Mesh,
    *,
    axes: Mapping[str, tuple[str | None, ...]],
    stages: Sequence[Sequence[str]],
    tied: Sequence[tuple[str, str]] = (),
    precision: str = "fp32",
    compiled: bool = False,
    allocating: AbstractContextManager[object] | None = None,
) -> Applied:
    """Turns `module`, built on the meta device, into this rank's part of `layout` on the mesh's device, unfilled.

    `axes` is the parameter table, `stages` the block names of every pipeline stage, `tied` pairs of names that share
    a tensor. Order matters: cut into a stage, slice for tensor parallelism, recompute, compile, shard. What takes
    memory happens within `allocating`: a rehearsal gives a mode there whose tensors are fake.
    """
    if layout.pp > 1:
        blocks = dict(module.blocks.named_children())  # type: ignore[union-attr]
        module = Stage({name: blocks[name] for name in stages[mesh.at.pp]})
    axes = {**axes, **{alias: axes[name] for name, alias in tied}}
    split = _split(layout, module, mesh, axes)
    tied_ends = _tie(module, tied, layout, mesh)
    blocks = _blocks(module)
    if layout.recompute != "none":
        for block in blocks.values():
            if any(True for _ in block.parameters()):
                block.forward = _recomputing(block.forward, layout.recompute)
    if compiled:
        for block in blocks.values():
            block.compile(dynamic=False)
    _shard(layout, module, blocks, mesh, precision, one_group={name for pair in tied for name in pair})
    with allocating or nullcontext():
        module.to_empty(device=mesh.device)
        _settle_storage(module)
    pieces = _pieces(layout, module, mesh, split.boxes, tied_ends, {alias: name for name, alias in tied})
    return Applied(module, pieces, split.partial, tied_ends, split.output)


def _settle_storage(module: nn.Module) -> None:
    """FSDP2 may move a shard into padded storage before its first use; after one gathering it stays where it is, so
    that the optimizer may hold it."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.unshard()
            child.reshard()


def _split(layout: Layout, module: nn.Module, mesh: Mesh, axes: Mapping[str, tuple[str | None, ...]]) -> TensorSplit:
    if layout.tp == 1:
        boxes = {name: Box.whole(tuple(p.shape)) for name, p in module.named_parameters(remove_duplicate=False)}
        return TensorSplit(boxes, frozenset(), None)
    region = Region(Split(mesh.tp_group, mesh.at.tp, layout.tp), layout.sequence_parallel)
    return split_module(module, axes, region)


def _tie(module: nn.Module, tied: Sequence[tuple[str, str]], layout: Layout, mesh: Mesh) -> str | None:
    """Makes tied parameters one again after slicing. Where the two live on different stages, returns the name that
    this stage holds, so that the caller sums its gradient over both ends."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for original, alias in tied:
        if {original, alias} <= names:
            path, _, leaf = original.rpartition(".")
            parameter = getattr(module.get_submodule(path), leaf)
            path, _, leaf = alias.rpartition(".")
            setattr(module.get_submodule(path), leaf, parameter)
        elif mesh.ends is not None and names & {original, alias}:
            return original if original in names else alias
    return None


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The units of recompute, compilation and sharding: the model's blocks, or the whole where it names none."""
    blocks = getattr(module, "blocks", None)
    return dict(blocks.named_children()) if isinstance(blocks, nn.Module) else {"": module}


def _recomputing(forward: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """`forward`, whose activations are dropped and computed again in the backward pass."""
    context: dict[str, Any] = {}
    if mode == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    def recomputed(x: Tensor, **inputs: Any) -> Tensor:
        result: Tensor = checkpoint(forward, x, use_reentrant=False, **context, **inputs)
        return result

    return recomputed


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(
    layout: Layout,
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    mesh: Mesh,
    precision: str,
    one_group: set[str],
) -> None:
    """FSDP2 carries every kind of data parallelism: replicated is a shard degree of one.

    Tied blocks stay with the root group, because one parameter cannot be in two groups. Between micro-batches of a
    pipeline the gathered weights are kept, or each would be gathered once a micro-batch.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh.data,
        "mp_policy": bf16 if precision == "bf16" else MixedPrecisionPolicy(),
        "reshard_after_forward": layout.shard > 1 and layout.pp == 1,
    }
    for name, block in blocks.items():
        holds_tied = any(f"blocks.{name}.{inner}" in one_group for inner, _ in block.named_parameters())
        if block is not module and not holds_tied and any(True for _ in block.parameters()):
            fully_shard(block, **options)
    fully_shard(module, **options)


def _pieces(
    layout: Layout,
    module: nn.Module,
    mesh: Mesh,
    boxes: Mapping[str, Box],
    tied_ends: str | None,
    aliases: Mapping[str, str],
) -> dict[str, Piece]:
    """The box of each parameter after both splits, how many ranks hold it, and which of them owns it.

    Owners are spread: parameter k of the module belongs to replica k modulo the number of replicas.
    """
    pieces = {}
    for index, (name, parameter) in enumerate(module.named_parameters()):
        box = boxes[name]
        over_tp = layout.tp if box.shape == box.global_shape else 1
        sharded = box.split(0, layout.shard, mesh.at.shard) if box.shape else box
        assert tuple(_local(parameter).shape) == sharded.shape, (name, tuple(_local(parameter).shape), sharded.shape)
        ends = 2 if name == tied_ends else 1
        replicas = layout.replicate * over_tp * ends
        mine = mesh.at.replicate * over_tp + (mesh.at.tp if over_tp > 1 else 0)
        owner = index % (layout.replicate * over_tp) == mine
        if name == tied_ends:
            # The first stage's copy is the one that is written down.
            owner = owner and mesh.first_stage
        pieces[name] = Piece(aliases.get(name, name), sharded, replicas, owner)
    return pieces


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
