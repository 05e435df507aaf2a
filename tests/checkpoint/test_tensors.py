from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from meshwright.checkpoint.tensors import build_header, cover_fault, from_bytes, parse_header, runs, to_bytes
from meshwright.layout import Box


@st.composite
def inner_and_outer(draw: st.DrawFn) -> tuple[Box, Box]:
    """A box, and one around it, of the same tensor."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))

    def part(whole: Box) -> Box:
        start = tuple(draw(st.integers(s, s + n)) for s, n in zip(whole.start, whole.shape, strict=True))
        sizes = (draw(st.integers(0, w + n - s)) for s, w, n in zip(start, whole.start, whole.shape, strict=True))
        return Box(shape, start, tuple(sizes))

    outer = part(Box.whole(shape))
    return part(outer), outer


@settings(max_examples=200, derandomize=True)
@given(boxes=inner_and_outer())
def test_runs_address_the_elements_that_indexing_does(boxes: tuple[Box, Box]) -> None:
    inner, outer = boxes
    expected = np.zeros(outer.shape, dtype=np.int32)
    local = np.arange(1, inner.elements + 1, dtype=np.int32).reshape(inner.shape)
    index = tuple(slice(s - o, s - o + n) for s, o, n in zip(inner.start, outer.start, inner.shape, strict=True))
    expected[index] = local
    written = np.zeros(outer.elements, dtype=np.int32).tobytes()
    target = bytearray(written)
    for source, position, size in runs(inner, outer, 4):
        target[position : position + size] = local.tobytes()[source : source + size]
    assert bytes(target) == expected.tobytes()


def test_whole_rows_are_one_run_and_columns_one_a_row() -> None:
    whole = Box.whole((8, 6))
    assert len(list(runs(whole.split(0, 2, 1), whole, 4))) == 1
    assert len(list(runs(whole.split(1, 2, 1), whole, 4))) == 8


def test_header_is_what_the_library_reads_and_the_other_way_round() -> None:
    tensors = {"b": torch.tensor([True]), "w": torch.randn(2, 3), "h": torch.randn(3).to(torch.bfloat16)}
    codes = {"b": "BOOL", "w": "F32", "h": "BF16"}
    header, slots, size = build_header((name, codes[name], tuple(t.shape)) for name, t in tensors.items())
    data = bytearray(header.ljust(size, b"\0"))
    for name, slot in slots.items():
        assert slot.offset % tensors[name].itemsize == 0
        data[slot.offset : slot.offset + slot.bytes] = to_bytes(tensors[name]).tobytes()
    read = load(bytes(data))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert parse_header(bytes(data), "here") == slots
    assert parse_header(save(tensors), "there").keys() == tensors.keys()


def test_bytes_there_and_back() -> None:
    tensor = torch.randn(3, 2).to(torch.bfloat16)
    assert torch.equal(from_bytes(to_bytes(tensor).reshape(3, 2, 2), "BF16"), tensor)
    assert from_bytes(to_bytes(torch.tensor(5)), "I64").item() == 5


@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([Box.whole((4, 4))], ""),
        ([Box.whole((4, 4)).split(1, 3, index) for index in range(3)], ""),
        ([Box.whole((4, 4)).split(0, 2, 0)], "do not cover"),
        ([Box.whole((4, 4)), Box.whole((4, 4)).split(0, 2, 1)], "the same elements"),
        ([Box((4, 4), (2, 0), (3, 4))], "outside"),
    ],
)
def test_cover_fault(boxes: list[Box], fault: str) -> None:
    found = cover_fault(boxes, (4, 4))
    assert fault in found and bool(fault) == bool(found)
