"""Large pages change where weights lie, never what they are."""

from __future__ import annotations

import pytest
import torch

from meshwright.engine.pages import use_large_pages
from meshwright.engine.products import Linear, packs


def test_contents_stay() -> None:
    held = torch.arange(3 << 20, dtype=torch.float32)
    assert use_large_pages([(held.data_ptr(), held.nbytes)]) >= 0
    assert torch.equal(held, torch.arange(3 << 20, dtype=torch.float32))


def test_no_places_and_places_that_are_not_mapped() -> None:
    assert use_large_pages([]) == 0
    assert use_large_pages([(1 << 46, 4096)]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_plain_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 32, dtype=dtype), torch.randn(48, dtype=dtype)
    linear = Linear(weight, bias)
    address, size = linear.place
    assert address and size >= weight.nbytes
    for rows in (1, 8, 100):
        x, y = torch.randn(rows, 32, dtype=dtype), torch.randn(rows, 48, dtype=dtype)
        exact = x.double() @ weight.double().T + bias.double()
        scale = 1e-5 if dtype is torch.float32 else 0.1
        for got, wanted in (
            (linear.plain()(x), exact),
            (linear.silu()(x), torch.nn.functional.silu(exact)),
            (linear.times()(x, y), exact * y.double()),
            (linear.plus()(x, y), exact + y.double()),
        ):
            assert (got.double() - wanted).abs().max() < scale * wanted.abs().max()


def test_packs_only_what_onednn_takes() -> None:
    cpu = torch.device("cpu")
    assert not packs(torch.float16, cpu) and not packs(torch.float64, cpu)
    assert not packs(torch.float32, torch.device("meta"))
