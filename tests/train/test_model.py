"""What a job's model holds in memory before and after its first values are set."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from meshwright.job import Job
from meshwright.layout import Execution, Layout
from meshwright.parallel import apply, fake_mesh
from meshwright.train.model import model_of_job

MODULE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"a": nn.Linear(512, 1024), "b": nn.Linear(1024, 512)})
        self.blocks["a"].register_buffer("mask", torch.ones(256, 256), persistent=False)
        self.blocks["b"].register_buffer("mean", torch.zeros(512))
    def forward(self, x):
        return self.blocks["b"](self.blocks["a"](x))
    def sample_input(self):
        return torch.zeros(1, 512)
def build():
    return Net()
"""
WHOLE = 4 * (2 * 512 * 1024 + 1024 + 512 + 256 * 256 + 512)
SLACK = 100_000  # bytes of what else lives in this process


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    (tmp_path / "mw_held.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mw_held", raising=False)
    yield Job(
        model={"module": "mw_held:build", "module_folder": str(tmp_path)},
        data={"source": "digits"},
        train={"steps": 1, "lr": 1e-3, "global_batch": 4},
    )


def live_bytes() -> int:
    """Bytes of every storage on the CPU that a tensor of this process refers to."""
    gc.collect()
    storages: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and not isinstance(one, FakeTensor):
            plain = one.to_local() if isinstance(one, DTensor) else one
            if plain.device.type == "cpu":
                storages[plain.untyped_storage()._cdata] = plain.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_rank_keeps_its_part_of_a_custom_module_and_nothing_else(job: Job) -> None:
    before = live_bytes()
    model = model_of_job(job, None)
    assert live_bytes() - before == pytest.approx(WHOLE, abs=SLACK), "one copy, until the first values are set"
    layout = Layout(dp=4, shard=4)
    with fake_mesh(layout, 1) as mesh:
        part = apply(Execution(layout, (("a", "b"),), "fp32"), model.card, model.module, mesh)
        model.fill(part)
        assert part.local("blocks.a.weight").abs().sum() > 0
        held = live_bytes() - before
    buffers = 4 * (256 * 256 + 512)
    assert held == pytest.approx((WHOLE - buffers) / 4 + buffers, abs=SLACK)
    assert model.names.keys() == set(part.placements), "what is saved needs the names alone"


def test_a_pipeline_stage_lets_go_of_the_other_stages(job: Job) -> None:
    before = live_bytes()
    model = model_of_job(job, None)
    layout = Layout(pp=2, schedule="gpipe")
    with fake_mesh(layout, 1) as mesh:
        model.fill(part := apply(Execution(layout, (("a",), ("b",)), "fp32"), model.card, model.module, mesh))
        assert set(part.placements) == {"blocks.b.weight", "blocks.b.bias", "blocks.b.mean"}
        assert live_bytes() - before == pytest.approx(4 * (512 * 1024 + 2 * 512), abs=SLACK)
