"""The trainer beside a plain loop of transformers' model, torch's AdamW and torch's clipping."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from meshwright.families.llama.card import LlamaShape, hf_config, hf_names
from meshwright.families.llama.module import build
from meshwright.launch import Context
from meshwright.layout import Box, Layout
from meshwright.train.model import initial_values
from tests.worlds import CLIP, GLOBAL_BATCH, SHAPES, STEPS, Case, RandomTokens, train_one


def plain_loop(shape: LlamaShape) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the loop that anybody would write."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**hf_config(shape)), dtype=torch.float32
    )
    weights, names = dict(model.named_parameters()), hf_names(shape)
    rule = build(shape).init_rule
    with torch.no_grad():
        for ours, theirs in names.items():
            weights[theirs].copy_(initial_values(0, rule)(ours, Box.whole(tuple(weights[theirs].shape))))
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        rate = step / 2 if step <= 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        batch = RandomTokens(shape.vocab).batch(step, 0, GLOBAL_BATCH)
        logits = model(batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("shape", SHAPES)
def test_one_device_equals_a_plain_loop(shape: str, tmp_path: Path) -> None:
    losses, norms = plain_loop(LlamaShape(**SHAPES[shape]))
    trained = train_one(Case(Layout(micro_batch=2), shape), Context.alone(), tmp_path / "gradients")
    assert trained.losses == pytest.approx(losses, rel=1e-5)
    assert trained.norms == pytest.approx(norms, rel=1e-5)
    assert max(norms) > CLIP, "nothing was clipped, so clipping was not tested"
