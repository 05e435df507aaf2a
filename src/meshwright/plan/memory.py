"""Bytes that one rank of each stage holds at its worst moment, split by what they are for.

Weights are fp32 masters and two fp32 moments, split `shard` ways (FSDP2; mixed precision as in Micikevicius et al.
2018). Beside the masters stands a copy in the compute precision: of the whole stage where it is kept gathered, else of
two blocks at a time. Gradients are fp32, whole while micro-batches accumulate, since they are reduced once a step.
Activations are the card's `saved` list times the micro-batches in flight (Korthikanti et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from meshwright.card import Block, Saved
from meshwright.cluster import Device
from meshwright.plan.compute import BYTES

#: What a process holds before it has a model: libraries on a CPU (resident), context and libraries on a GPU.
PROCESS_BYTES = {"cpu": 450 * 1024**2, "cuda": 900 * 1024**2}
#: Share of a device's memory that a plan may fill; the rest is for the system and the allocator's gaps.
USABLE = {"cpu": 0.9, "cuda": 0.94}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    other: int  # the process itself, communication buffers, working memory of one block

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def usable_bytes(device: Device) -> int:
    """Bytes of a device that a plan may fill."""
    return int(device.memory_bytes * USABLE[device.kind])


def saved_bytes(block: Block, *, tp: int, sequence_parallel: bool, precision: str, recompute: str) -> int:
    """Bytes one sample leaves in a block for the backward pass; `recompute` as in the Layout, "full" keeping only the
    input (counted by the caller, who knows it): 0 here."""
    if recompute == "full":
        return 0
    kept = [saved for saved in block.saved if not (recompute == "selective" and saved.selective)]
    return sum(_one(saved, tp, sequence_parallel, precision) for saved in kept)


def _one(saved: Saved, tp: int, sequence_parallel: bool, precision: str) -> int:
    size = saved.elements * (saved.bytes_per_element or BYTES[precision])
    divided = saved.split == "tp" or (saved.split == "sp" and sequence_parallel)
    return size // tp if divided else size


def stage_memory(
    *,
    elements: int,
    largest_block_elements: int,
    kept_bytes: int,
    working_bytes: int,
    in_flight: int,
    shard: int,
    kept_gathered: bool,
    accumulates: bool,
    precision: str,
    device: Device,
) -> StageMemory:
    """Memory of a rank whose stage has `elements` parameters after tensor parallelism.

    `kept_bytes` is what a micro-batch leaves behind, `working_bytes` what is alive only inside one block.
    `kept_gathered`: the copy for computing is of the whole stage. `accumulates`: a step has several micro-batches.
    """
    own = -(-elements // shard)
    size = BYTES[precision]
    copied = elements if kept_gathered else min(2 * largest_block_elements, elements)
    buffers = largest_block_elements * (size + 4)  # a block's gradient before, and while, it is reduced
    return StageMemory(
        weights=4 * own + size * copied,
        gradients=4 * (elements if accumulates else own),
        optimizer=8 * own,
        activations=kept_bytes * in_flight,
        other=PROCESS_BYTES[device.kind] + buffers + working_bytes,
    )
