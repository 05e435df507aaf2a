"""A module's own table of axes: what it buys, and what is refused before it could train wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.errors import InputError
from meshwright.trace import card_of
from meshwright.trace.axes import parameter_axes

RIGHT: dict[str, tuple[str | None, ...]] = {
    "pair.up.weight": ("ffn", "embed"),
    "pair.up.bias": ("ffn",),
    "pair.down.weight": ("embed", "ffn"),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.up(x)))


class Net(nn.Module):
    def __init__(self, table: dict[str, tuple[str | None, ...]]) -> None:
        super().__init__()
        self.pair = Pair()
        self.loose = nn.ModuleDict({"up": nn.Linear(4, 8, bias=False), "down": nn.Linear(8, 4, bias=False)})
        self.head = nn.Linear(4, 16, bias=False)
        self.parameter_axes = table

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.loose["down"](self.loose["up"](self.pair(x))))


def test_a_table_of_axes_allows_tensor_parallelism() -> None:
    card = card_of(lambda: Net({**RIGHT, "head.weight": ("vocab", "embed")}), torch.zeros(1, 4), "net")
    assert card.splittable == {"tp"}
    axes = {parameter.name: parameter.axes for parameter in card.parameters}
    assert axes["pair.up.weight"] == ("ffn", "embed")
    assert axes["pair.norm.weight"] == (None,)
    splits = {product.name: product.split for block in card.blocks for product in block.products}
    assert splits == {"pair.up": "ffn", "pair.down": "ffn", "loose.up": "", "loose.down": "", "head": "vocab"}
    assert card.axis_sizes() == {"ffn": {8}, "embed": {4}, "vocab": {16}}


def test_a_module_without_a_table_has_no_axes() -> None:
    assert parameter_axes(nn.Linear(2, 2)) is None
    assert card_of(lambda: nn.Linear(2, 2), torch.zeros(1, 2), "net").parameters[0].axes == (None, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pair.upp.weight": ("ffn", "embed")}, "did you mean 'pair.up.weight'"),
        ({"pair.up.weight": ("ffm", "embed")}, "did you mean 'ffn'"),
        ({"pair.up.weight": ("ffn",)}, "2 dimensions"),
        ({"pair.norm.weight": ("ffn",)}, "a LayerNorm cannot be split"),
        ({"pair.up.bias": (None,)}, "add 'pair.up.bias': \\('ffn',\\)"),
        (
            {"pair.down.weight": ("embed", None)},
            "pair.up.*no Linear beside it in the same module is split by its input",
        ),
        ({"pair.up.weight": (None, "embed"), "pair.up.bias": (None,)}, "pair.down.*is split by its output"),
        ({"loose.up.weight": ("ffn", None), "loose.down.weight": (None, "ffn")}, "in a module of their own"),
        ({"head.weight": ("ffn", "embed")}, "head.weight.*split by its output"),
    ],
)
def test_a_wrong_table_is_refused(change: dict[str, tuple[str | None, ...]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parameter_axes(Net({**RIGHT, **change}))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (5, "parameter_axes: must be a table, found a int"),
        ({"weight": 5}, "parameter_axes['weight']: must be a tuple of axes; name an axis, or None"),
        ({"weight": ("ffn", ["embed"])}, "there is no axis '['embed']'"),
    ],
)
def test_a_table_that_is_none_is_refused(table: Any, said: str) -> None:
    module = nn.Linear(4, 4)
    module.parameter_axes = table
    with pytest.raises(InputError) as refused:
        parameter_axes(module)
    assert said in str(refused.value)


def test_every_wrong_entry_is_listed() -> None:
    with pytest.raises(InputError) as caught:
        parameter_axes(Net({"a": ("ffn",), "b": ("ffn",), "head.weight": ("x", "y")}))
    assert len(caught.value.problems) == 4
