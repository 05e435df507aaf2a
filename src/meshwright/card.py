"""The Card of a model: its blocks with their sizes and costs, for plans, rules and the pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Parameter:
    """A parameter by its name in the module, its global shape, and the logical axis of each dimension (or None)."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Buffer:
    """A buffer by its name in the module, its shape, and the bytes of an element. No layout splits it. A `persistent`
    one is part of what is saved of a model, as in a module's `state_dict`."""

    name: str
    shape: tuple[int, ...]
    element_bytes: int
    persistent: bool = True

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass of one sample: (rows x inner) @ (inner x columns).

    `split` is the logical axis along which tensor parallelism divides it ("" for none). Experts make `groups` products,
    each with its own matrix and, if balanced, rows / groups rows.
    """

    name: str
    rows: int
    inner: int
    columns: int
    split: str = ""
    groups: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class AttentionShape:
    """Softmax attention of one sample: heads x head_dim queries over kv_heads keys and values, seq_len long.

    `value_dim` is the width of a value, 0 for that of a key. With a `window` a query sees only that many last keys.
    """

    heads: int
    kv_heads: int
    head_dim: int
    seq_len: int
    causal: bool = True
    value_dim: int = 0
    window: int | None = None

    @property
    def flops(self) -> int:
        """Forward flops of both products (scores, values), the causal half counted once."""
        each = 2 * self.heads * (self.head_dim + (self.value_dim or self.head_dim))
        if self.window is not None and self.window < self.seq_len:
            outside = self.seq_len - self.window
            return (
                each * (self.seq_len * self.seq_len - outside * outside) // 2
                if self.causal
                else (each * self.seq_len * self.window)
            )
        return each * self.seq_len * self.seq_len // (2 if self.causal else 1)


@dataclass(frozen=True)
class Activation:
    """An activation kept for the backward pass: elements of one sample, and what splits it.

    `split`: "tp" is always divided by tensor parallelism, "sp" only with sequence parallelism, "" never.
    `bytes_per_element` 0 means the compute precision. `selective` is dropped by selective recompute. `module` is the
    part of the block that keeps it, in Megatron-LM's words for what may be recomputed, or "product" (a product's input)
    or "loss". `on` is the condition under which it is kept, "" for always: a kind of device ("cpu"), with a precision
    ("cpu bf16"), or "selective" (results of products in a recomputed block), with tensor parallelism ("selective tp":
    their sums over ranks).
    """

    name: str
    elements: int
    split: str = ""
    bytes_per_element: int = 0
    selective: bool = False
    module: str = ""
    on: str = ""

    def is_kept(self, kind: str, precision: str) -> bool:
        """Whether a `kind` of device keeps it in `precision` without recompute."""
        return self.on in ("", kind, f"{kind} {precision}")


@dataclass(frozen=True)
class Experts:
    """A mixture in a block: `count` experts of width `ffn`. A token visits `top_k` experts, and shared ones of width
    `shared_ffn`. `imbalance` is the busiest expert-parallel rank's tokens over the mean."""

    count: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    imbalance: float = 1.0


@dataclass(frozen=True)
class Block:
    """One of a model's ordered blocks, between which a pipeline may cut. `output_elements` is of one sample."""

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    products: tuple[Product, ...] = ()
    attention: AttentionShape | None = None
    saved: tuple[Activation, ...] = ()
    output_elements: int = 0
    elementwise_elements: int = 0  # elements read or written by memory-bound operations of one sample's forward
    experts: Experts | None = None
    buffers: tuple[Buffer, ...] = ()

    @property
    def parameter_elements(self) -> int:
        return sum(parameter.elements for parameter in self.parameters)

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers)

    @property
    def saved_buffer_bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers if buffer.persistent)

    @property
    def forward_flops(self) -> int:
        """Forward flops of one sample: matrix products and attention."""
        return sum(p.flops for p in self.products) + (self.attention.flops if self.attention else 0)


@dataclass(frozen=True)
class Card:
    """A model as its ordered blocks. `unit` is the unit of speed: "tokens" or "samples".

    `units_per_sample` is the sequence length of a language model, 1 for a classifier. `tied` lists pairs of parameter
    names that share one tensor (the second is the alias, which its block does not list). `splittable` says how `apply`
    may split it: "pp" if it names its blocks, "tp" if its parameters have axes. `built_whole`: every process builds the
    whole model to get its first values, as a build function of the user's does.
    """

    name: str
    blocks: tuple[Block, ...]
    unit: str = "samples"
    units_per_sample: int = 1
    tied: tuple[tuple[str, str], ...] = ()
    splittable: frozenset[str] = field(default_factory=frozenset)
    stateful_buffers: tuple[str, ...] = ()  # buffers that training changes (running statistics)
    built_whole: bool = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(parameter for block in self.blocks for parameter in block.parameters)

    @property
    def persistent_buffers(self) -> tuple[Buffer, ...]:
        return tuple(buffer for block in self.blocks for buffer in block.buffers if buffer.persistent)

    @property
    def parameter_elements(self) -> int:
        return sum(block.parameter_elements for block in self.blocks)

    @property
    def forward_flops(self) -> int:
        """Forward flops of one sample."""
        return sum(block.forward_flops for block in self.blocks)

    @cached_property
    def kinds(self) -> tuple[list[tuple[Block, int]], list[int]]:
        """Blocks that differ in more than names, each with the elements of its input, and the index of each block's
        kind. The first and the last block are kinds of their own."""
        indices: dict[object, int] = {}
        kinds: list[tuple[Block, int]] = []
        index = []
        input_elements, end = self.blocks[0].output_elements, len(self.blocks) - 1
        for place, block in enumerate(self.blocks):
            shapes = tuple((p.shape, p.axes) for p in block.parameters)
            work = (block.products, block.attention, block.experts, block.elementwise_elements)
            what = (block.kind, work, block.saved, block.output_elements, block.buffer_bytes, block.saved_buffer_bytes)
            key = (shapes, what, input_elements, place if place in (0, end) else -1)
            if key not in indices:
                indices[key] = len(kinds)
                kinds.append((block, input_elements))
            index.append(indices[key])
            input_elements = block.output_elements
        return kinds, index

    def axis_sizes(self) -> dict[str, set[int]]:
        """The sizes of each logical axis, for the divisibility rules. Attention axes count heads, not features."""
        sizes: dict[str, set[int]] = {}
        for block in self.blocks:
            if block.attention:
                sizes.setdefault("heads", set()).add(block.attention.heads)
                sizes.setdefault("kv_heads", set()).add(block.attention.kv_heads)
            for parameter in block.parameters:
                for size, axis in zip(parameter.shape, parameter.axes, strict=True):
                    if axis is not None and axis not in ("heads", "kv_heads"):
                        sizes.setdefault(axis, set()).add(size)
        return sizes
