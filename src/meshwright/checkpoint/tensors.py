"""The safetensors format, and boxes in its tensors.

A file is 8 bytes (little endian: length of the header), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes, row-major, without holes. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meshwright.checkpoint.files import dump_json
from meshwright.errors import InputError, Problem
from meshwright.files import parse_json
from meshwright.layout import Box
from meshwright.placement import Placement

#: By name: the placement of a rank's part of a tensor, and the local tensor of shape placement.box.shape.
LocalTensors = Mapping[str, tuple[Placement, torch.Tensor]]

#: Element type in the format's word -> in torch's.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


def saves(dtype: torch.dtype) -> bool:
    """Whether tensors of this type can be saved."""
    return dtype in CODES


#: The safetensors library refuses longer headers too.
HEADER_CAP_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_BYTES = 1 << 53  # of one tensor; sizes up to here are exact in any JSON reader
#: The most bytes of a tile, the part of a piece that has a digest of its own: a rank that needs a part of a piece
#: hashes little more than that part.
TILE_BYTES = 1 << 20
TENSOR_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,512}")


@dataclass(frozen=True)
class Slot:
    """The position of a tensor in a file: `offset` in bytes from the file's start; `dtype` in the format's word."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def tile_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of the tiles of a piece of `shape`: halved along its longest dimension until TILE_BYTES hold a tile, so
    that both parts by rows and parts by columns are made of whole tiles."""
    tile = list(shape)
    while math.prod(tile) * itemsize > TILE_BYTES:
        longest = tile.index(max(tile))
        tile[longest] = -(-tile[longest] // 2)
    return tuple(tile)


def tile_count(shape: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """The number of tiles of a piece of `shape`."""
    return math.prod(-(-size // max(1, step)) for size, step in zip(shape, tile, strict=True))


def tiles(box: Box, tile: tuple[int, ...]) -> Iterator[Box]:
    """The tiles of a box, row-major. The last one along a dimension may be smaller."""
    stops = tuple(first + size for first, size in zip(box.start, box.shape, strict=True))
    steps = [range(first, stop, max(1, step)) for first, stop, step in zip(box.start, stops, tile, strict=True)]
    for start in itertools.product(*steps):
        shape = tuple(min(step, stop - at) for at, stop, step in zip(start, stops, tile, strict=True))
        yield Box(box.global_shape, start, shape)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, Slot], int]:
    """The header for tensors of (name, dtype word, shape), each tensor's Slot, and the size of the whole file.

    Wider elements come first, so that every tensor begins at a multiple of its element size.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize)
    record: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in ordered:
        stop = position + math.prod(shape) * DTYPES[dtype].itemsize
        record[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = dump_json(record)
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slots = {
        name: Slot(dtype, tuple(shape), len(header) + record[name]["data_offsets"][0]) for name, dtype, shape in ordered
    }
    return header, slots, len(header) + position


def parse_header(data: Any, where: str) -> dict[str, Slot]:
    """Slots of a mapped safetensors file. Raises InputError naming file and tensor if it is malformed."""
    size = len(data)
    length = int.from_bytes(data[:8], "little") if size >= 8 else 0
    if length < 2 or length > min(HEADER_CAP_BYTES, size - 8):
        raise InputError(
            Problem(where, f"is not safetensors: it says its header has {length} bytes, the file has {size}")
        )
    record = parse_json(bytes(data[8 : 8 + length]), f"{where} (header)")
    if not isinstance(record, dict):
        raise InputError(Problem(where, "its header is not a JSON object"))
    slots: dict[str, Slot] = {}
    for name, entry in record.items():
        if name != "__metadata__":
            slots[name] = _parse_slot(name, entry, 8 + length, where)
    position = 8 + length
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if slot.offset != position:
            raise InputError(Problem(where, f"tensor {name!r} overlaps another or leaves a hole before it"))
        position += slot.bytes
    if position != size:
        raise InputError(Problem(where, f"is {size} bytes long, its header describes {position}: cut short or padded"))
    return slots


def _parse_slot(name: str, entry: Any, data_start: int, where: str) -> Slot:
    what = f"tensor {name[:200]!r}"
    if not TENSOR_NAME.fullmatch(name):
        raise InputError(Problem(where, f"{what} has a name that is too long or has control characters"))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(Problem(where, f"{what} needs exactly dtype, shape and data_offsets"))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(Problem(where, f"{what} has a dtype that is not supported", "known: " + ", ".join(DTYPES)))
    if not is_shape(shape) or not _is_offsets(offsets):
        raise InputError(Problem(where, f"{what} has a malformed shape or data_offsets"))
    slot = Slot(dtype, tuple(shape), data_start + offsets[0])
    if slot.bytes != offsets[1] - offsets[0]:
        raise InputError(Problem(where, f"{what} needs {slot.bytes} bytes, its data_offsets give another size"))
    return slot


def _is_offsets(value: Any) -> bool:
    """Whether a JSON value is a pair of positions in a file, begin and end."""
    return isinstance(value, list) and len(value) == 2 and all(type(at) is int and 0 <= at <= MAX_BYTES for at in value)


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a list of sizes: whole numbers from 0, within MAX_DIMENSIONS and MAX_BYTES."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    if not all(type(size) is int and 0 <= size <= MAX_BYTES for size in value):
        return False
    return math.prod(size for size in value if size) <= MAX_BYTES


def element_view(data: Any, slot: Slot) -> np.ndarray:
    """Bytes of a tensor in a mapped file as an array of shape [*slot.shape, bytes per element], not copied."""
    itemsize = DTYPES[slot.dtype].itemsize
    if slot.bytes == 0:
        return np.empty((*slot.shape, itemsize), dtype=np.uint8)
    flat = np.frombuffer(data, dtype=np.uint8, count=slot.bytes, offset=slot.offset)
    return flat.reshape(*slot.shape, itemsize)


def to_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous host tensor as a flat array of its bytes, shared, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def from_bytes(elements: np.ndarray, dtype: str) -> torch.Tensor:
    """The reverse of `element_view`: a new tensor of shape elements.shape[:-1]."""
    copy = np.array(elements, order="C", copy=True)
    return torch.from_numpy(copy.reshape(-1)).view(DTYPES[dtype]).reshape(elements.shape[:-1])


def digest_of(elements: np.ndarray) -> str:
    """SHA-256 of an array's bytes, row-major."""
    return hashlib.sha256(np.ascontiguousarray(elements).reshape(-1).data).hexdigest()


def slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    """The index of `inner` in an array of `outer`."""
    return tuple(
        slice(start - base, start - base + size)
        for start, base, size in zip(inner.start, outer.start, inner.shape, strict=True)
    )


def runs(inner: Box, outer: Box, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(byte offset in `inner`, byte offset in `outer`, bytes) of each part of `inner` that is contiguous in `outer`.

    Whole rows are one part; a split by columns has one part per row.
    """
    if inner.elements == 0:
        return
    dims = len(inner.shape)
    # Whole trailing dimensions and the one before them are contiguous.
    first = dims
    while first > 0 and inner.shape[first - 1] == outer.shape[first - 1]:
        first -= 1
    first = max(first - 1, 0)
    part_bytes = math.prod(inner.shape[first:]) * itemsize
    strides = [math.prod(outer.shape[d + 1 :]) * itemsize for d in range(dims)]
    base = sum((inner.start[d] - outer.start[d]) * strides[d] for d in range(dims))
    for count, index in enumerate(itertools.product(*(range(inner.shape[d]) for d in range(first)))):
        yield count * part_bytes, base + sum(i * strides[d] for d, i in enumerate(index)), part_bytes


def cover_fault(boxes: Sequence[Box], shape: tuple[int, ...]) -> str:
    """What is wrong unless the boxes tile a tensor of `shape` exactly, then "". Near-linear for splits by rows."""
    for box in boxes:
        if any(start + size > whole for start, size, whole in zip(box.start, box.shape, shape, strict=True)):
            return "a piece reaches outside the tensor"
    ordered = sorted(boxes, key=lambda box: box.start)
    open_boxes: list[Box] = []
    for box in ordered:
        if shape:
            open_boxes = [other for other in open_boxes if other.start[0] + other.shape[0] > box.start[0]]
        if any(other.intersect(box) for other in open_boxes):
            return "two pieces hold the same elements"
        open_boxes.append(box)
    if sum(box.elements for box in boxes) != math.prod(shape):
        return "its pieces do not cover it: some elements were not saved"
    return ""
