"""The cache grows by doubling, keeps what it holds, and never passes its limits."""

from __future__ import annotations

import pytest
import torch

from meshwright.engine.cache import KeyValueCache, bytes_per_token
from meshwright.engine.scheduler import Move


def cache(max_batch: int = 4, max_len: int = 1000) -> KeyValueCache:
    return KeyValueCache(2, 3, 8, max_batch, max_len, torch.float32, torch.device("cpu"))


def write(held: KeyValueCache, layer: int, slot: int, position: int, value: float) -> None:
    rows = held.rows(torch.tensor([slot]), torch.tensor([position]))
    held.flat()[layer][rows] = value


def test_growth_keeps_the_contents_and_the_limits() -> None:
    held = cache()
    write(held, 1, 0, 5, 7.0)
    held.reserve(3, 600)
    assert held.slots >= 3 and 600 <= held.length <= 1000
    held.reserve(4, 1000)
    assert (held.slots, held.length) == (4, 1000)
    assert held.bytes == 4 * 1000 * bytes_per_token(2, 3, 8, torch.float32)
    assert (held.tensors[1][:, 0, :, 5] == 7.0).all() and held.tensors[1].sum() == 7.0 * 2 * 3 * 8
    with pytest.raises(AssertionError):
        held.reserve(5, 10)
    with pytest.raises(AssertionError):
        held.reserve(1, 1001)


def test_starts_small() -> None:
    assert cache(max_batch=64, max_len=100_000).bytes < 1_000_000


def test_rows_are_the_keys_then_the_values_of_every_head() -> None:
    held = cache()
    held.reserve(2, 10)
    rows = held.rows(torch.tensor([1, 0]), torch.tensor([4, 9]))
    flat = held.flat()[0]
    flat[rows] = torch.arange(12.0)[:, None].expand(-1, 8)
    assert held.tensors[0][:, 1, :, 4, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert held.tensors[0][:, 0, :, 9, 7].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_moves_copy_in_order() -> None:
    held = cache()
    held.reserve(3, 10)
    for position in range(4):
        write(held, 0, 2, position, 5.0)
    held.apply((Move(2, 1, 4), Move(1, 0, 3)))
    assert (held.tensors[0][:, 1, :, :4] == 5).all() and (held.tensors[0][:, 0, :, :3] == 5).all()
    assert (held.tensors[0][:, 0, :, 3:] == 0).all()


def test_clear_keeps_what_it_is_told() -> None:
    held = cache()
    held.reserve(3, 10)
    for slot in range(3):
        held.tensors[1][:, slot] = torch.nan
    held.tensors[1][:, 1, :, :4] = 5.0
    held.clear(())
    assert held.tensors[1].isnan().any()
    held.clear((0, 4))
    assert (held.tensors[1][:, 1, :, :4] == 5).all() and held.tensors[1].sum() == 5.0 * 4 * 2 * 3 * 8
