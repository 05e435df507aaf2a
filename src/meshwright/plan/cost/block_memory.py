"""Bytes of one block on one rank: parameters, saved activations, and the working memory of its backward."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.card import Activation, Block, Parameter
from meshwright.cluster import Device
from meshwright.layout import AXIS_RULES, Layout
from meshwright.plan.rules import Framework

#: Bytes of an element between products, by the precision that products run in.
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "fp4": 2}
#: Bytes of an element that is saved as the input of a product.
SAVED_OPERAND_BYTES = {**ELEMENT_BYTES, "fp8": 1, "fp4": 1}


def saved_bytes(saved: Activation, *, tp: int, sequence_parallel: bool, precision: str) -> int:
    """Bytes per sample of a saved activation on one of `tp` ranks."""
    width = (SAVED_OPERAND_BYTES if saved.module == "product" else ELEMENT_BYTES)[precision]
    size = saved.elements * (saved.bytes_per_element or width)
    divided = saved.split == "tp" or (saved.split == "sp" and sequence_parallel)
    return size // tp if divided else size


def local_size(parameter: Parameter, tp: int, ep: int, vocab_multiple: int) -> int:
    """Elements of a parameter on one rank; a vocabulary is padded to a multiple of `vocab_multiple` x tp first."""
    total = 1
    for size, axis in zip(parameter.shape, parameter.axes, strict=True):
        ways = {"tp": tp, "ep": ep}.get(AXIS_RULES.get(axis) or "", 1) if axis is not None else 1
        if axis == "vocab" and vocab_multiple > 1:
            size = -(-size // (vocab_multiple * tp)) * vocab_multiple * tp
        total *= -(-size // ways)
    return total


@dataclass(frozen=True)
class BlockBytes:
    """One kind of block on one rank: local elements of its dense parameters, its experts and each matrix by name; bytes
    `saved` by a micro-batch for its backward, of which `loss` by the loss, and bytes that the backward needs on top."""

    dense: int
    expert: int
    saved: int
    loss: int
    working: int
    matrices: tuple[tuple[str, int], ...]


class BlockMemory:
    """Blocks under one framework at one precision, on one kind of device."""

    def __init__(self, framework: Framework, precision: str, device: Device) -> None:
        self.framework, self.precision, self.kind = framework, precision, device.kind
        self.width = ELEMENT_BYTES[precision]

    def expert_tp(self, layout: Layout) -> int:
        """Tensor-parallel ranks that an expert is split over."""
        return layout.tp if self.framework.splits_experts else 1

    def block_bytes(self, block: Block, inputs: int, layout: Layout) -> BlockBytes:
        """Bytes of one block whose input has `inputs` elements per sample."""
        micro, tp = layout.micro_batch, layout.tp

        def size(saved: Activation) -> int:
            sequence = layout.sequence_parallel
            return saved_bytes(saved, tp=tp, sequence_parallel=sequence, precision=self.precision) * micro // layout.cp

        sizes = [(saved, size(saved)) for saved in block.saved if saved.is_kept(self.kind, self.precision)]
        whole, loss = sum(n for _, n in sizes), sum(n for saved, n in sizes if saved.module == "loss")
        entry = inputs * self.width * micro // layout.cp
        keep = whole
        if layout.recompute == "selective" and self.framework.selective == "block":
            keep = (whole + entry) // 2  # every other block is recomputed
        elif layout.recompute == "selective":
            keep = sum(n for saved, n in sizes if not saved.selective)
            whens = ("selective", "selective tp") if tp > 1 else ("selective",)
            keep += sum(size(saved) for saved in block.saved if saved.on in whens)
        elif layout.recompute == "full" and block.kind not in self.framework.never_recomputed:
            keep = entry // (tp if layout.sequence_parallel else 1) + loss
        # A backward holds gradients of the widest saved tensor and of its input, gathered.
        widest = max((n for saved, n in sizes if saved.module != "loss"), default=0)
        dense, expert, matrices = self._local(block, layout)
        return BlockBytes(dense, expert, keep, loss, whole - min(keep, whole) + widest + 2 * entry, matrices)

    def _local(self, block: Block, layout: Layout) -> tuple[int, int, tuple[tuple[str, int], ...]]:
        dense, expert, matrices = 0, 0, []
        for parameter in block.parameters:
            is_expert = "expert" in parameter.axes
            tp, ep = (self.expert_tp(layout), layout.ep) if is_expert else (layout.tp, 1)
            elements = local_size(parameter, tp, ep, self.framework.vocab_multiple)
            dense, expert = (dense, expert + elements) if is_expert else (dense + elements, expert)
            if len(parameter.shape) > 1 and "positions" not in parameter.axes and block.kind != "embedding":
                matrices.append((parameter.name.split(".", 2)[-1], elements))
        return dense, expert, tuple(matrices)
