"""The code of docs/models.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from meshwright.trace import card_of

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def names_of_page() -> dict[str, dict[str, Any]]:
    """What each Python block of the page defines, run after the imports of the first."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    found = {}
    for title, code in zip(("least", "blocks", "axes"), blocks, strict=True):
        names: dict[str, Any] = {}
        exec("import torch\nfrom torch import nn\n" + code, names)
        found[title] = names
    return found


def test_the_code_of_the_page_does_what_it_says() -> None:
    page = names_of_page()
    least = card_of(lambda: page["least"]["build"](width=128), None, "least")
    assert least.splittable == frozenset()
    blocks = card_of(lambda: page["blocks"]["Net"](32, 3), torch.zeros(1, 64), "blocks")
    assert blocks.splittable == {"pp"}
    assert [block.name for block in blocks.blocks] == ["stem", "0", "1", "2", "head"]
    axes = card_of(lambda: page["axes"]["Split"](32), torch.zeros(1, 64), "axes")
    assert axes.splittable == {"pp", "tp"}
    assert axes.axis_sizes() == {"ffn": {128}, "embed": {32}}
