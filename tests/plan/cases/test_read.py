"""Cases from outside: a bad line does not stop the others, and only the inputs of a case are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.plan.cases import BadCase, read_cases
from meshwright.plan.cases.read import (
    ABOUT,
    KEYS,
    LARGEST_LINE_BYTES,
    Case,
    nearest_word,
    parse_case,
    parse_line,
    parse_measured_case,
)

LINE: dict[str, Any] = {
    "id": "a",
    "model": {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 2048, "vocab": 32000, "seq_len": 1024},
    "cluster": {"device": "a100-sxm-80gb", "devices": 16, "devices_per_node": 8},
    "train": {"global_batch": 64, "precision": "bf16"},
    "layout": {"dp": 4, "tp": 2, "pp": 2, "micro_batch": 2},
    "software": {"framework": "megatron-lm"},
}


def changed(section: str, key: str, value: Any) -> dict[str, Any]:
    return {**LINE, section: {**LINE[section], key: value}}


def error_of(line: dict[str, Any]) -> str:
    found = parse_case(line)
    assert isinstance(found, BadCase), found
    return found.error


def test_a_sound_line_is_a_case_with_its_layout_filled_in() -> None:
    found = parse_case(LINE)
    assert isinstance(found, Case)
    assert found.layout["shard"] == found.layout["cp"] == found.layout["vpp"] == 1
    assert found.layout["recompute"] == "none"
    assert found.assumed == ()


def test_dp_follows_from_the_other_degrees_and_is_reported() -> None:
    found = parse_case({**LINE, "layout": {"tp": 2, "pp": 2, "micro_batch": 2}})
    assert isinstance(found, Case)
    assert found.layout["dp"] == 4
    assert "layout.dp = 4" in found.assumed[0]


@pytest.mark.parametrize(
    ("section", "key", "value", "where", "near"),
    [
        ("model", "layers", "4", "model.layers", "give a number"),
        ("model", "layers", True, "model.layers", "give a number"),
        ("model", "layers", 4.5, "model.layers", "nearest: 4"),
        ("model", "layers", 0, "model.layers", "nearest: 1"),
        ("model", "layers", 10**400, "model.layers", "nearest: 4096"),
        ("model", "layers", None, "model.layers", "give a number"),
        ("model", "heds", 4, "model.heds", "did you mean 'heads'?"),
        ("model", "gated", "yes", "model.gated", "give true or false"),
        ("model", "heads", 7, "model.heads", "nearest: 4"),
        ("model", "kv_heads", 3, "model.kv_heads", "nearest: 2"),
        ("cluster", "devices", 15, "layout", "nearest: devices=16"),
        ("cluster", "devices_per_node", 5, "cluster.devices_per_node", "nearest: 4"),
        ("cluster", "device", ["x"], "cluster.device", "give a word"),
        ("cluster", "figures", 3, "cluster.figures", "give a table"),
        ("cluster", "figures", {"inter_gbps": 0}, "cluster.figures.inter_gbps", "nearest: 0.001"),
        ("cluster", "figures", {"tflops": {"bf17": 1}}, "cluster.figures.tflops.bf17", "did you mean 'bf16'?"),
        ("train", "global_batch", -1, "train.global_batch", "nearest: 1"),
        ("train", "global_batch", 66, "train.global_batch", "nearest: global_batch=72"),
        ("layout", "micro_batch", 3, "layout.micro_batch", "nearest: micro_batch=2"),
        ("layout", "dp", 8, "layout", "nearest: dp=4"),
        ("layout", "shard", 3, "layout.shard", "nearest: 2"),
        ("layout", "optimizer_shard", 8, "layout.optimizer_shard", "nearest: 4"),
        ("layout", "pp", 0, "layout.pp", "nearest: 1"),
        ("layout", "sequence_parallel", 1, "layout.sequence_parallel", "give true or false"),
        ("layout", "recompute", 7, "layout.recompute", "give a word"),
        ("layout", "ep", 2, "layout.ep", "nearest: ep=1"),
        ("model", "experts", 8, "model.top_k", "nearest: top_k=1"),
        ("software", "compiled", True, "software.compiled", "did you mean 'compile'?"),
    ],
)
def test_an_error_names_its_key_and_the_nearest_valid_value(
    section: str, key: str, value: Any, where: str, near: str
) -> None:
    error = error_of(changed(section, key, value))
    assert where in error
    assert near in error


def test_virtual_stages_need_a_pipeline_and_stages_blocks() -> None:
    assert "vpp=1" in error_of({**LINE, "layout": {"dp": 16, "vpp": 2}})
    deep = {**LINE, "layout": {"dp": 1, "pp": 16}, "train": {"global_batch": 16}}
    assert "nearest: pp=6" in error_of(deep)
    many = {**LINE, "layout": {"dp": 1, "pp": 16, "vpp": 64}, "train": {"global_batch": 16}}
    assert "nearest: vpp=32" in error_of({**many, "model": {**LINE["model"], "layers": 2000}})


def test_missing_figures_are_named_all_at_once() -> None:
    error = error_of({"id": "x"})
    assert all(word in error for word in ("model.layers", "cluster.device", "train.global_batch"))


def test_unknown_keys_of_a_line_are_errors() -> None:
    assert "did you mean 'layout'?" in error_of({**LINE, "layuot": {}})


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"a"',
        b'{"id": NaN}',
        b'{"id": Infinity}',
        b'{"id": 1, "id": 2}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"id": ' + b"9" * 5000 + b"}",
    ],
)
def test_lines_that_are_no_json_object(text: bytes) -> None:
    found = parse_line(text, 7)
    assert isinstance(found, BadCase)
    assert found.id is None
    assert "line 7" in found.error


def test_bad_lines_leave_the_others_in_order(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    long = b"x" * (3 * LARGEST_LINE_BYTES)
    good = json.dumps(LINE).encode()
    path.write_bytes(b"\n".join([b"{bad", good, b"", long, json.dumps({**LINE, "id": "b"}).encode(), b'{"id": "c"}']))
    found = list(read_cases(path))
    assert [one.id for one in found] == [None, "a", None, "b", "c"]
    assert [isinstance(one, Case) for one in found] == [False, True, False, True, False]
    assert "too long" in found[2].error  # type: ignore[union-attr]


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        list(read_cases(tmp_path / "none.jsonl"))
    with pytest.raises(InputError):
        list(read_cases(tmp_path))


def test_what_a_line_says_about_itself_changes_nothing() -> None:
    plain = parse_case(LINE)
    line = {**LINE, **dict.fromkeys(ABOUT, "other"), "model": {**LINE["model"], "name": "gpt-9"}}
    assert parse_case(line) == plain


def test_measured_figures_are_read_apart() -> None:
    measured = {"step_seconds": 2.5, "peak_allocated_gib": 11}
    found = parse_measured_case({**LINE, "measured": measured, "source": "s", "group": "g"})
    assert not isinstance(found, BadCase)
    assert (found.step_seconds, found.peak_allocated_gib, found.peak_reserved_gib) == (2.5, 11.0, None)
    assert (found.source, found.group) == ("s", "g")
    for wrong in (None, {}, {"step_seconds": 0}, {"step_seconds": "2"}, {"step_seconds": 1, "peak_reserved_gib": -1}):
        assert isinstance(parse_measured_case({**LINE, "measured": wrong}), BadCase)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.sampled_from([s for s in KEYS if s in LINE]), st.data())
def test_any_value_anywhere_gives_a_case_or_a_reason(section: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*KEYS[section], "other"]))
    found = parse_case(changed(section, key, data.draw(JSON)))
    assert isinstance(found, Case) or found.error


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from([*LINE, "kind", "x"]), JSON, max_size=6))
def test_any_object_gives_a_case_or_a_reason(line: dict[str, Any]) -> None:
    found = parse_case(line)
    assert isinstance(found, Case) or found.error


def test_the_nearest_meaning_of_a_word() -> None:
    words = {"fp8": "fp8", "mxfp8": "fp8", "bf16": "bf16"}
    assert nearest_word("FP8", words, "bf16") == ("fp8", True)
    assert nearest_word("fp8-blockwise-3", words, "bf16") == ("fp8", False)
    assert nearest_word("bf61", words, "fp8") == ("bf16", False)
    assert nearest_word("?", words, "bf16") == ("bf16", False)
