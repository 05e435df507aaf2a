"""`apply`: a plain module and its Execution become this rank's part, ready to train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshwright.card import Card
from meshwright.layout import Box, Execution
from meshwright.nn import Split
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.tensor import Region, split_module
from meshwright.placement import Placement, placements, tensor_split

#: Gives the values of a box of a parameter or a persistent buffer: (name, box) -> tensor of box.shape.
Source = Callable[[str, Box], Tensor]

#: Selective recompute keeps the results of matrix products, attention and collectives: dear to repeat.
_SAVED_OPERATIONS = {
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
class ParallelModel:
    """This rank's part of a model.

    `placements` has a row per parameter and persistent buffer, by its name in the module; `local(name)` is the rank's
    box of it, a plain tensor that shares its storage. `output` is how the output is split.
    """

    module: nn.Module
    placements: Mapping[str, Placement]
    output: Split | None

    def local(self, name: str) -> Tensor:
        if name in self._parameters:
            return _local(self._parameters[name])
        return self.module.get_buffer(name)  # looked up each time: a forward pass may put another tensor in its place

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers, whole, by name."""
        return {name: self.local(name) for name in self.placements if name not in self._parameters}

    def local_gradient(self, name: str) -> Tensor | None:
        gradient = self._parameters[name].grad
        return None if gradient is None else _local(gradient)

    @functools.cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def fill(self, source: Source, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Sets what has a row from `source`, and every other buffer from `buffers` or its module's `reset_buffers`."""
        for child in self.module.modules():
            reset = getattr(child, "reset_buffers", None)
            if callable(reset):
                reset()
        for name, placement in self.placements.items():
            if placement.box.elements:
                self.local(name).copy_(source(placement.name, placement.box))
        for name, buffer in self.module.named_buffers():
            if buffers and name in buffers and name not in self.placements:
                buffer.copy_(buffers[name])

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward pass reduces gradients over the data-parallel ranks or only accumulates them."""
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
    execution: Execution,
    card: Card,
    module: nn.Module,
    mesh: Mesh,
    *,
    allocating: AbstractContextManager[object] | None = None,
) -> ParallelModel:
    """Turns `module`, built on the meta device, into this rank's part of it on the mesh's device, unfilled.

    A plan's Choice is an Execution; `card` is of the same model. The order matters: cut into a stage, slice for tensor
    parallelism, recompute, compile, shard. Memory is allocated within `allocating`: a rehearsal passes a mode whose
    tensors are fake.
    """
    layout = execution.layout
    stage = execution.stages[mesh.at.pp] if layout.pp > 1 else None
    if stage is not None:
        blocks = dict(module.blocks.named_children())  # type: ignore[union-attr]
        module = Stage({name: blocks[name] for name in stage})
    output = None
    if layout.tp > 1:
        region = Region(Split(mesh.tp_group, mesh.at.tp, layout.tp), layout.sequence_parallel)
        output = split_module(module, tensor_split(card), region)
    _tie(module, card)
    blocks = _blocks(module)
    if layout.recompute != "none":
        for block in blocks.values():
            if any(True for _ in block.parameters()):
                block.forward = _recomputing(block.forward, layout.recompute)
    if execution.compiled:
        for block in blocks.values():
            block.compile(dynamic=False)
    _shard(execution, module, blocks, mesh, tied={name for pair in card.tied for name in pair})
    with allocating or nullcontext():
        module.to_empty(device=mesh.device)
        _allocate_shards(module)
    rows = placements(card, layout, mesh.at, stage)
    model = ParallelModel(module, rows, output)
    shapes = {name: tuple(model.local(name).shape) for name in {**dict(module.named_parameters()), **rows}}
    assert shapes == {name: row.box.shape for name, row in rows.items()}, (shapes, rows)
    return model


def _allocate_shards(module: nn.Module) -> None:
    """FSDP2 may move a shard into padded storage at its first use. Gathering once moves it before the optimizer takes
    references."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.unshard()
            child.reshard()


def _tie(module: nn.Module, card: Card) -> None:
    """Ties this stage's tied parameters again, which slicing separated."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for original, alias in card.tied:
        if {original, alias} <= names:
            path, _, leaf = alias.rpartition(".")
            setattr(module.get_submodule(path), leaf, module.get_parameter(original))


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The units of recompute, compilation and sharding: the model's blocks, or the whole model if it names none."""
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
    return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(
    execution: Execution, module: nn.Module, blocks: Mapping[str, nn.Module], mesh: Mesh, tied: set[str]
) -> None:
    """FSDP2 carries every kind of data parallelism: replicated is a shard degree of one.

    Tied blocks stay in the root group, because one parameter cannot be in two groups. A pipeline keeps the gathered
    weights between micro-batches, or every micro-batch would gather them again.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh.data,
        "mp_policy": bf16 if execution.precision == "bf16" else MixedPrecisionPolicy(),
        "reshard_after_forward": execution.layout.shard > 1 and execution.layout.pp == 1,
    }
    for name, block in blocks.items():
        has_tied = any(f"blocks.{name}.{inner}" in tied for inner, _ in block.named_parameters())
        if block is not module and not has_tied and any(True for _ in block.parameters()):
            fully_shard(block, **options)
    fully_shard(module, **options)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
