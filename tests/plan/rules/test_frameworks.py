"""The table of frameworks: its words, and how a case's options change a row."""

from __future__ import annotations

import pytest

from meshwright.errors import InputError
from meshwright.layout import RECOMPUTE, SCHEDULES, Layout
from meshwright.plan.cost.gpu import FLASH_SHARE, FUSED_STARTS
from meshwright.plan.rules import FRAMEWORKS
from meshwright.plan.rules.frameworks import framework


def test_every_row_uses_valid_words() -> None:
    fields = set(Layout.__dataclass_fields__)
    for name, row in FRAMEWORKS.items():
        assert row.name == name and framework(name) is row
        assert row.offers.fields <= fields and set(row.offers.schedules) <= set(SCHEDULES)
        assert set(row.offers.recompute) <= set(RECOMPUTE)
        assert row.attention in {*FLASH_SHARE, "unfused"} and row.fused in FUSED_STARTS
        assert row.optimizer_shard in ("none", "dp") and row.selective in ("attention", "block", "others", "operations")
        shares = (row.gradient_overlap, row.gather_overlap, row.tensor_overlap, row.context_overlap)
        assert all(0 <= share <= 1 for share in shares)


def test_a_cases_words_change_the_row() -> None:
    row = FRAMEWORKS["torchtitan"]
    changed = row.with_software({"framework": "torchtitan", "compile": True, "async_tp": True})
    assert (changed.fused, changed.assumed) == ("compiled", ())
    assert changed.tensor_overlap > row.tensor_overlap
    assert row.with_software({"fused_cross_entropy": True}).fused_cross_entropy


def test_an_unknown_word_is_listed() -> None:
    assert "warp_drive" in FRAMEWORKS["nemo"].with_software({"warp_drive": True}).assumed[0]


def test_an_unknown_framework_is_bad_input_and_names_the_nearest() -> None:
    with pytest.raises(InputError, match="megatron-lm"):
        framework("megatron-ml")
