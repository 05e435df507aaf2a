"""Records one forward pass under fake tensors: products, attention, memory-bound work and saved activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from meshwright.card import Activation, AttentionShape, Product
from meshwright.layout import split_dimension

#: Operations that pick rows of a table: they read the rows that they return, not the whole table.
PICKS = ("embedding", "gather", "index", "index_select", "take", "slice_scatter")


@dataclass
class BlockRecord:
    """The work of one block. `saved` sums elements by (module path, bytes per element; 0 for floating point)."""

    products: list[Product] = field(default_factory=list)
    attention: AttentionShape | None = None
    saved: dict[tuple[str, int], int] = field(default_factory=dict)
    elementwise_elements: int = 0

    def saved_activations(self) -> tuple[Activation, ...]:
        return tuple(
            Activation(name, count, bytes_per_element=size) for (name, size), count in self.saved.items() if count
        )


class Recorder(TorchDispatchMode):
    """Adds each operation to the record of the running block ("" outside every block).

    `axes`: logical axes by parameter name. Storage of parameters and buffers is not counted as activations.
    """

    def __init__(self, module: nn.Module, blocks: Mapping[str, nn.Module], axes: Mapping[str, tuple[str | None, ...]]):
        super().__init__()
        self.records: dict[str, BlockRecord] = {name: BlockRecord() for name in ["", *blocks]}
        self.written_storages: set[int] = set()  # of buffers
        self._blocks, self._axes, self._module = blocks, axes, module
        self._block = ""
        self._path: list[str] = [""]
        self._parameters = {storage_of(p): name for name, p in module.named_parameters()}
        self._buffers = {storage_of(buffer) for buffer in module.buffers()}
        self._saved: dict[int, Tensor] = {}  # the reference keeps the address of the storage from being reused

    @property
    def _record(self) -> BlockRecord:
        return self.records[self._block]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records all operations within."""
        handles = []
        for name, block in self._blocks.items():
            handles.append(block.register_forward_pre_hook(self._set_block(name)))
            handles.append(block.register_forward_hook(self._set_block(""), always_call=True))
        prefixes = {id(block): name for name, block in self._blocks.items()}
        for path, child in self._module.named_modules():
            if id(child) not in prefixes and child is not self._module:
                handles.append(child.register_forward_pre_hook(self._enter(self._short(path))))
                handles.append(child.register_forward_hook(self._leave, always_call=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _short(self, path: str) -> str:
        """A module's path without its block's: "blocks.0.mix.in" -> "mix.in"."""
        for name in self._blocks:
            if path.startswith(f"blocks.{name}."):
                return path.removeprefix(f"blocks.{name}.")
        return path

    def _set_block(self, name: str) -> Callable[..., None]:
        return lambda *_: setattr(self, "_block", name)

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda *_: self._path.append(path)

    def _leave(self, *_: Any) -> None:
        self._path.pop()

    def _save(self, tensor: Tensor) -> Tensor:
        key = storage_of(tensor)
        if key not in self._parameters and key not in self._buffers and key not in self._saved:
            self._saved[key] = tensor
            size = 0 if tensor.is_floating_point() else tensor.element_size()
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            name = (self._path[-1], size)
            self._record.saved[name] = self._record.saved.get(name, 0) + elements
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return out
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        self._note_writes(func, args)
        name = func._schema.name.partition("::")[2]
        if name.startswith("_scaled_dot_product"):
            self._note_attention(args, kwargs or {})
        elif (dims := _product_dims(name, args, outputs)) is not None:
            rows, inner, columns = dims
            self._record.products.append(Product(self._product_name(name), rows, inner, columns, self._split(inputs)))
        elif not _is_view(inputs, outputs, func._schema.is_mutable):
            read = sum(o.numel() for o in outputs) if name in PICKS else sum(i.numel() for i in inputs)
            self._record.elementwise_elements += read + sum(o.numel() for o in outputs)
        return out

    def _product_name(self, operation: str) -> str:
        return self._path[-1] or operation

    def _split(self, inputs: list[Tensor]) -> str:
        """The logical axis by which tensor parallelism divides a product with one of the parameters."""
        for tensor in inputs:
            axes = self._axes.get(self._parameters.get(storage_of(tensor), ""), ())
            dim = split_dimension(axes)
            if dim is not None:
                return axes[dim] or ""
        return ""

    def _note_writes(self, func: Any, args: tuple[Any, ...]) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and storage_of(value) in self._buffers:
                self.written_storages.add(storage_of(value))

    def _note_attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A block's first attention of a whole sequence is its `attention`; windows and further ones are products.

        query [B, H, T, D], key [B, KH, S, D].
        """
        query, key = args[0], args[1]
        batch, heads, length, width = query.shape
        causal = bool(kwargs.get("is_causal", False)) or (len(args) > 3 and any(a is True for a in args[3:]))
        if batch == 1 and length == key.shape[2] and self._record.attention is None:
            self._record.attention = AttentionShape(heads, key.shape[1], width, length, causal)
            return
        name = self._product_name("attention")
        rows = batch * heads * length
        self._record.products.append(Product(f"{name}.scores", rows, width, key.shape[2]))
        self._record.products.append(Product(f"{name}.values", rows, key.shape[2], width))


def storage_of(tensor: Tensor) -> int:
    """The storage of a tensor, equal for tensors that share one while any of them lives."""
    return tensor.untyped_storage()._cdata


def _is_view(inputs: list[Tensor], outputs: list[Tensor], writes: bool) -> bool:
    """Whether an operation only returns views of its inputs and writes to none."""
    storages = {storage_of(tensor) for tensor in inputs}
    return not writes and bool(outputs) and all(storage_of(tensor) in storages for tensor in outputs)


def _product_dims(name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> tuple[int, int, int] | None:
    """(rows, inner, columns) of a matrix product or convolution, None for any other operation."""
    if name in ("mm", "_int_mm"):
        return args[0].shape[0], args[0].shape[1], args[1].shape[1]
    if name in ("addmm", "_addmm_activation"):
        return args[1].shape[0], args[1].shape[1], args[2].shape[1]
    if name in ("bmm", "baddbmm"):
        left, right = (args[0], args[1]) if name == "bmm" else (args[1], args[2])
        return left.shape[0] * left.shape[1], left.shape[2], right.shape[2]
    if name in ("mv", "dot", "addmv"):
        matrix = args[1] if name == "addmv" else args[0]
        return math.prod(matrix.shape[:-1]), matrix.shape[-1], 1
    if name in ("convolution", "_convolution"):
        data, weight, transposed = args[0], args[1], args[6]
        # weight: [out, in/groups, *kernel], or [in, out/groups, *kernel] when transposed.
        spatial = data if transposed else outputs[0]
        rows = spatial.shape[0] * math.prod(spatial.shape[2:])
        if transposed:
            return rows, weight.shape[0], math.prod(weight.shape[1:])
        return rows, math.prod(weight.shape[1:]), weight.shape[0]
    return None
