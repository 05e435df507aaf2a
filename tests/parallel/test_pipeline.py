"""A stage of torch's pipeline, alone in its process."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from meshwright.launch import Context
from meshwright.layout import Layout
from meshwright.parallel import Pipeline, start
from tests.train.normed_model import Body


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return (output.flatten(1).sum(1) - targets).square().sum()


def test_only_real_batches_change_buffers(tmp_path: Path) -> None:
    """torch learns the shapes by passes of invented values, at the first step and after each evaluation."""
    torch.manual_seed(0)
    stage = Body(4)
    plain = copy.deepcopy(stage)
    passes: list[object] = []
    stage.register_forward_hook(lambda *_: passes.append(None))
    x, targets = torch.randn(3, 6, 8, 8), torch.zeros(6)
    with start(Layout(), Context.alone()) as mesh:
        pipeline = Pipeline(SimpleNamespace(module=stage), mesh, 2, loss)  # type: ignore[arg-type]
        for batch in x:
            stage.train()
            pipeline.step(batch, {}, targets)
            stage.eval()
            pipeline.evaluate(batch, {}, targets)
    for batch in x:
        for micro_batch in batch.split(3):
            plain(micro_batch)
    assert len(passes) > 4 * len(x), "torch no longer makes invented passes: the stage needs no care"
    assert dict(stage.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(stage.get_buffer(name), buffer, rtol=0, atol=0, msg=name)
