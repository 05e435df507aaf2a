"""The doctor's picture is JSON and names what is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from meshwright.probe import diagnose, doctor


def problems_of(picture: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {problem["where"]: problem["what"] for problem in picture["problems"]}


def test_the_picture_is_json_with_what_this_machine_has() -> None:
    picture = json.loads(json.dumps(diagnose(quick=True)))
    assert picture["packages"]["torch"] == torch.__version__ or picture["packages"]["torch"]
    assert picture["cpu"]["cores"] >= 1
    assert picture["speeds"] is None
    assert [row["opened_by"] for row in picture["sockets"]].count("serve") == 2
    assert {"where", "what", "nearest"} == set().union(*picture["problems"], {"where", "what", "nearest"})


@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_a_cpu_that_is_slow_at_bf16_is_told(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    assert diagnose(quick=True)["cpu"]["slow_bf16"] is True


def test_the_speeds_are_in_the_picture() -> None:
    picture = json.loads(json.dumps(diagnose()))
    assert picture["speeds"]["links"][0]["collective"] == "all_reduce"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, *_: None)
    picture = diagnose(quick=True)
    assert picture["compiler"]["torch_compile"] is False
    assert "no C++ compiler" in problems_of(picture)["torch.compile"]


def test_a_version_of_torch_never_tried_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.0+cpu")
    assert "never tested" in problems_of(diagnose(quick=True))["torch"]


def test_little_memory_and_disk_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: 2**30)
    monkeypatch.setattr(doctor, "_disk", lambda: {"here": {"path": "/runs", "free_bytes": 2**29}})
    problems = problems_of(diagnose(quick=True))
    assert problems["memory"] == "only 1.0 GiB are free"
    assert "0.5 GiB" in problems["/runs"]
