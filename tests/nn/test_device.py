"""The device of a rank on machines that this one is not: torch's words for them, and answers of ours for torch's."""

from __future__ import annotations

import pytest
import torch

from meshwright.nn import backend, gpu_type, take_device


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> list[int]:
    """Lets torch say that it has `count` accelerators of a type; the indices that are made the current one."""
    taken: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    return taken


@pytest.mark.parametrize(("kind", "group"), [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl")])
def test_a_rank_takes_the_gpu_of_its_index(monkeypatch: pytest.MonkeyPatch, kind: str, group: str) -> None:
    taken = pretend(monkeypatch, kind, 4)
    assert gpu_type() == kind
    assert [take_device(index) for index in (1, 6)] == [torch.device(kind, 1), torch.device(kind, 2)]
    assert taken == [1, 2]
    assert backend(torch.device(kind, 1)) == group


def test_an_accelerator_that_we_do_not_train_on_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = pretend(monkeypatch, "mps", 1)
    assert gpu_type() is None
    assert take_device(0) == torch.device("cpu") and taken == []
    assert backend(torch.device("cpu")) == "gloo"
