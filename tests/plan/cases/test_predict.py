"""predict answers every line, reads a case's inputs alone, and says what it assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.cluster import named_cluster
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import PlanRequest, make_plan
from meshwright.plan.cases import Predictor, predictions, read_cases
from meshwright.plan.cases.read import ABOUT, Case, parse_case
from meshwright.plan.cases.resolve import case_shape
from meshwright.plan.constants import DATASHEET
from meshwright.plan.constants.profile import DATASHEET_INTERVALS
from meshwright.plan.rules import FRAMEWORKS

LINE: dict[str, Any] = {
    "id": "a",
    "model": {
        "layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096, "vocab": 32000, "seq_len": 1024,
        "gated": False,
    },
    "cluster": {"device": "a100-sxm-80gb", "devices": 16, "devices_per_node": 8},
    "train": {"global_batch": 64, "precision": "bf16"},
    "layout": {"dp": 4, "tp": 2, "pp": 2, "micro_batch": 2, "recompute": "full"},
    "software": {"framework": "megatron-lm"},
}  # fmt: skip


def changed(section: str, **values: Any) -> dict[str, Any]:
    return {**LINE, section: {**LINE[section], **values}}


def answer(line: dict[str, Any]) -> dict[str, Any]:
    case = parse_case(line)
    assert isinstance(case, Case), case
    return Predictor(DATASHEET).predict(case)


def test_the_answer_has_its_keys_and_its_parts_add_up() -> None:
    found = answer(LINE)
    assert set(found) - {"assumed"} == {"id", "step_seconds", "peak_allocated_gib", "peak_reserved_gib", "breakdown"}
    seconds = found["step_seconds"]
    assert 0 < seconds["low"] < seconds["mid"] < seconds["high"]
    assert sum(found["breakdown"].values()) == pytest.approx(seconds["mid"])
    assert 0 < found["peak_allocated_gib"] <= found["peak_reserved_gib"] < 80
    json.dumps(found, allow_nan=False)


def test_nothing_but_the_inputs_is_read() -> None:
    """Name, source, note, group, trust and what was measured are permuted; the answer stays as it is."""
    case = {**LINE, **{key: f"other {key}" for key in ABOUT}, "measured": {"step_seconds": 1e-3}}
    case["model"] = {**case["model"], "name": "gpt-5"}
    assert answer(case) == answer(LINE)


def test_each_line_is_answered_by_itself_and_in_order(tmp_path: Path) -> None:
    lines: list[Any] = [
        LINE,
        "not a case",
        changed("cluster", device="h900"),
        changed("layout", dp=3) | {"id": "odd"},
        changed("train", precision="fp8") | {"id": "no-rate"},
        {**LINE, "id": "last"},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = list(predictions(read_cases(path), DATASHEET))
    assert [one["id"] for one in found] == ["a", None, "a", "odd", "no-rate", "last"]
    assert ["error" in one for one in found] == [False, True, True, True, True, False]
    assert "unknown device 'h900'" in found[2]["error"]
    assert "figures" in found[2]["error"]
    assert "nearest: dp=4" in found[3]["error"]
    assert "a100-sxm-80gb" in found[4]["error"]
    assert found[5]["step_seconds"] == found[0]["step_seconds"]


FIGURES = {
    "memory_gb": 80, "memory_gbps": 2039, "tflops": {"bf16": 312, "fp32": 19.5}, "intra_gbps": 300, "inter_gbps": 25,
}  # fmt: skip


def test_an_unknown_device_that_brings_its_figures_is_answered() -> None:
    found = answer(changed("cluster", device="our-chip", figures=FIGURES))
    assert "error" not in found
    slower = answer(changed("cluster", device="our-chip", figures={**FIGURES, "tflops": {"bf16": 31, "fp32": 19.5}}))
    assert slower["step_seconds"]["mid"] > 1.1 * found["step_seconds"]["mid"]
    assert "tflops" in answer(changed("cluster", device="our-chip", figures={"memory_gb": 80}))["error"]


def test_words_that_are_not_known_are_guessed_said_and_widen_the_interval() -> None:
    known, guessed = answer(LINE), answer(changed("train", precision="bf16-exotic"))
    assert guessed["step_seconds"]["mid"] == pytest.approx(known["step_seconds"]["mid"])
    assert guessed["step_seconds"]["high"] > known["step_seconds"]["high"]
    assert guessed["step_seconds"]["low"] < known["step_seconds"]["low"]
    assert any("precision 'bf16-exotic': taken for bf16" in word for word in guessed["assumed"])
    recompute = answer(changed("layout", recompute="ful"))
    assert recompute["step_seconds"]["mid"] == pytest.approx(known["step_seconds"]["mid"])
    assert any("recompute 'ful': taken for full" in word for word in recompute["assumed"])


def test_unknown_recompute_is_the_least_that_fits() -> None:
    roomy = answer(changed("layout", recompute="unknown"))
    assert any("of 0% of the layers, the least that fits" in word for word in roomy["assumed"])
    none = answer(changed("layout", recompute="none"))
    assert roomy["step_seconds"]["mid"] == pytest.approx(none["step_seconds"]["mid"])
    big = {"layers": 48, "hidden": 8192, "heads": 64, "kv_heads": 64, "ffn": 32768, "seq_len": 4096}
    times = {}
    for word in ("none", "unknown", "full"):
        line = changed("model", **big)
        line["layout"] = {"dp": 1, "tp": 8, "pp": 2, "micro_batch": 2, "recompute": word}
        times[word] = answer(line)
    seconds = [times[word]["step_seconds"]["mid"] for word in ("none", "unknown", "full")]
    assert seconds[0] < seconds[1] < seconds[2]
    assert times["none"]["peak_reserved_gib"] > times["unknown"]["peak_reserved_gib"]
    assert sum(times["unknown"]["breakdown"].values()) == pytest.approx(seconds[1])


def test_data_sheets_promise_little() -> None:
    seconds = answer(LINE)["step_seconds"]
    low, high = DATASHEET_INTERVALS["all"]
    assert seconds["low"] == pytest.approx(low * seconds["mid"])
    assert seconds["high"] == pytest.approx(high * seconds["mid"])


def test_the_count_of_parameters_decides_what_the_table_leaves_open() -> None:
    model = {
        "layers": 24, "hidden": 2048, "heads": 16, "kv_heads": 16, "ffn": 8192, "vocab": 50368, "seq_len": 2048,
        "gated": False,
    }  # fmt: skip
    assert case_shape({**model, "params_b": 1.316}, FRAMEWORKS["llm-foundry"]).tied
    assert not case_shape({**model, "params_b": 1.42}, FRAMEWORKS["llm-foundry"]).tied
    assert case_shape(model, FRAMEWORKS["megatron-lm"]).biases
    llama = {**model, "gated": True}
    assert not case_shape(llama, FRAMEWORKS["torchtitan"]).tied


def test_what_was_measured_of_a_device_is_used() -> None:
    """All-reduce and memory as measured, in place of a share of the data sheet's figures."""
    inside = changed("layout", dp=1, tp=8, pp=2, recompute="none")
    found = {}
    for rate in (1.5, 100, 400):
        figures = {**FIGURES, "all_reduce_gbps": rate}
        found[rate] = answer({**inside, "cluster": {**LINE["cluster"], "figures": figures}})["step_seconds"]["mid"]
    assert found[1.5] > 1.5 * found[100] > 1.5 * found[400]
    slow, fast = (
        answer(changed("cluster", figures={**FIGURES, "measured_memory_gbps": rate}))["step_seconds"]["mid"]
        for rate in (300, 1700)
    )
    assert slow > 1.1 * fast
    as_stated = answer(changed("cluster", figures=FIGURES))["step_seconds"]["mid"]
    measured = 0.85 * FIGURES["memory_gbps"]  # what the data sheets' constant makes of that
    same = answer(changed("cluster", figures={**FIGURES, "measured_memory_gbps": measured}))["step_seconds"]["mid"]
    assert same == pytest.approx(as_stated)
    above = answer(changed("cluster", figures={**FIGURES, "measured_tflops": {"bf16": 400}}))
    assert "400 of bf16 is more than the peak of 312" in above["error"]
    for wrong in ({"measured_memory_gbps": 99999}, {"all_reduce_gbps": 1e5}):
        assert "is more than" in answer(changed("cluster", figures={**FIGURES, **wrong}))["error"]
    same = {"tflops": {"bf16": 312}, "memory_gbps": 2039}  # the table's own figures of this device
    assert answer(changed("cluster", figures=same)) == answer(LINE)


def test_a_case_of_ours_is_predicted_as_a_plan_of_ours() -> None:
    """The same layout of the same model: what our modules keep is one table, whichever verb asks."""
    shape = LlamaShape(8, 2048, 16, 4, 128, 5632, 32000)
    cluster = named_cluster("h100-sxm-80gb", 8)
    line = changed("cluster", device="h100-sxm-80gb", devices=8, devices_per_node=8)
    line["model"] = {
        "layers": 8, "hidden": 2048, "heads": 16, "kv_heads": 4, "ffn": 5632, "vocab": 32000, "seq_len": 4096,
        "gated": True,
    }  # fmt: skip
    for word in ("none", "selective", "full"):
        pins = {
            "dp": 2, "shard": 2, "tp": 2, "pp": 2, "sequence_parallel": True, "micro_batch": 1, "recompute": word,
            "schedule": "1f1b",
        }  # fmt: skip
        plan = make_plan(card(shape, 4096), cluster, PlanRequest(64, "bf16", pins, compile=False), DATASHEET)
        case = answer({**line, "layout": pins, "software": {"framework": "meshwright"}})
        chosen = plan.chosen
        assert case["step_seconds"]["mid"] == pytest.approx(chosen.predicted.step_seconds.mid, rel=0.01), word
        fullest = max(stage.allocated for stage in chosen.memory)
        assert case["peak_allocated_gib"] == pytest.approx(fullest / 2**30, rel=1e-6), word


def test_of_a_model_that_never_fits_memory_tells_no_recompute() -> None:
    line = changed("model", layers=200, hidden=8192, heads=64, kv_heads=64, ffn=32768)
    line["layout"] = {"dp": 16, "micro_batch": 4, "recompute": "unknown"}
    found, none = answer(line), answer({**line, "layout": {**line["layout"], "recompute": "none"}})
    assert any("taken for none, since the case does not fit even with full" in word for word in found["assumed"])
    assert found["step_seconds"]["mid"] == pytest.approx(none["step_seconds"]["mid"])
    assert found["step_seconds"]["high"] > none["step_seconds"]["high"], "it is a guess"


def test_a_count_of_parameters_that_the_sizes_miss_is_reported() -> None:
    """Feed-forwards of two matrices stated as three are corrected; a count that fits neither is reported."""
    sizes = {
        "layers": 32, "hidden": 6144, "heads": 48, "kv_heads": 8, "ffn": 24576, "vocab": 256000, "seq_len": 4096,
        "gated": True,
    }  # fmt: skip
    as_it_is = answer({**LINE, "model": {**sizes, "gated": False}})
    corrected = answer({**LINE, "model": {**sizes, "params_b": 15.0}})
    assert any("model.gated=true: 15 B parameters contradict it" in word for word in corrected["assumed"])
    assert corrected["step_seconds"]["mid"] == pytest.approx(as_it_is["step_seconds"]["mid"], rel=0.02)
    neither = answer({**LINE, "model": {**sizes, "params_b": 400.0}})
    assert any("model.params_b=400: the sizes come to" in word for word in neither["assumed"])
    right = answer({**LINE, "model": {**sizes, "gated": False, "params_b": 15.6}})
    assert not any("param" in word for word in right.get("assumed", []))
