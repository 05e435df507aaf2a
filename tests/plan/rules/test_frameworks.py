"""The table of frameworks: its words, and how a case's options change a row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.errors import InputError
from meshwright.families.llama.card import LlamaShape, card
from meshwright.layout import RECOMPUTE, SCHEDULES, Layout
from meshwright.plan.cases.resolve import card_style, case_shape
from meshwright.plan.constants.cpu import CPU_CONSTANTS
from meshwright.plan.constants.gpu import CONSTANTS
from meshwright.plan.constants.serving import SERVING_CONSTANTS
from meshwright.plan.cost.gpu import FLASH_SHARE, FUSED_STARTS
from meshwright.plan.rules import FRAMEWORKS, LayoutQuery, ModelFacts, refusals
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


@pytest.mark.parametrize("name", list(FRAMEWORKS))
def test_a_row_decides_and_not_its_name(name: str) -> None:
    """A framework of another name with the same row has the same pipeline and the same layers; what was once known by
    name is in the row."""
    row = FRAMEWORKS[name]
    few = Layout(pp=4, micro_batch=8)
    facts = ModelFacts.of(card(LlamaShape(6, 48, 12, 4, 4, 96, 240), 64))
    for other, same in ((row, True), (replace(row, torch_pipeline=not row.torch_pipeline), False)):
        found = {refusal.rule for refusal in refusals(LayoutQuery(few, facts, 4, 24, replace(other, name="another")))}
        expected = {refusal.rule for refusal in refusals(LayoutQuery(few, facts, 4, 24, row))}
        if "pp" in row.offers.fields:
            assert (found == expected) is same
    gpt = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 256, "vocab": 512, "seq_len": 64, "gated": False}
    assert case_shape(gpt, replace(row, name="another")).biases is row.biases
    assert card_style(name, "bf16", None) == row.style
    assert card_style(name, "fp16", None) == card_style(name, "bf16", "attention") == (row.legacy_style or row.style)


def test_every_constant_has_a_source_or_says_that_it_is_assumed() -> None:
    for row in (*CONSTANTS, *CPU_CONSTANTS, *SERVING_CONSTANTS):
        assert len(row.source) > 4 and "physics" not in row.source, row.name
