"""Greedy completions equal `transformers`' on 50 prompts a family, and those of the plain module without a cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meshwright.checkpoint import read_model_folder
from meshwright.engine import Engine
from meshwright.families.decoder import parameters
from meshwright.families.llama.card import hf_names
from meshwright.families.llama.module import build
from meshwright.layout import Box
from meshwright.placement import Placement

transformers = pytest.importorskip("transformers")

PROMPTS, NEW, VOCAB = 50, 12, 199
#: Where the reference's two best logits are closer than this, either token is right.
TOO_CLOSE = 1e-4


def prompts(seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(PROMPTS)]


def completions(engine: Engine, batch: list[list[int]], new: int = NEW) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in batch]
    for index, event in engine.generate(batch, max_tokens=new, ignore_eos=True):
        out[index].append(event.token)
    return out


def first_clear_difference(ours: list[int], theirs: list[int], scores: Tensor) -> int | None:
    """Index of the first token that differs although the reference's scores [new, V] were not too close; or None."""
    for at, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            best = scores[at].topk(2).values
            return None if best[0] - best[1] < TOO_CLOSE else at
    return None


@pytest.mark.parametrize("kind", ["llama", "llama_tied_biased", "llama_scaled", "mistral", "qwen2", "qwen3"])
def test_equals_transformers(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = prompts()
    with Engine.open(folder, max_batch=8) as engine:
        ours = completions(engine, batch)
    listed = []
    for index, prompt in enumerate(batch):
        answer = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        theirs = answer.sequences[0, len(prompt) :].tolist()
        scores = torch.cat(answer.scores)
        assert len(ours[index]) == NEW
        assert first_clear_difference(ours[index], theirs, scores) is None, (index, ours[index], theirs)
        if ours[index] != theirs:
            listed.append(index)
    print(f"{kind}: {len(listed)} of {PROMPTS} prompts part where the best two logits are too close: {listed}")
    assert len(listed) < 5


def test_equals_the_plain_module_without_a_cache(llama: Path) -> None:
    with Engine.open(llama, max_batch=4) as engine:
        batch = prompts(seed=1)[:6]
        ours = completions(engine, batch)
        shape = engine.shape
    module = build(shape)
    names = hf_names(shape)
    held = dict(module.named_parameters())
    wanted = {p.name: (Placement(p.name, Box.whole(p.shape), 1, True), held[p.name]) for p in parameters(shape)}
    read_model_folder(llama, names, wanted)
    for prompt, completion in zip(batch, ours, strict=True):
        ids = list(prompt)
        for token in completion:
            with torch.no_grad():
                logits = module(torch.tensor([ids]), positions=torch.arange(len(ids))[None])[0, -1]
            best = logits.topk(2)
            assert token == best.indices[0] or best.values[0] - best.values[1] < TOO_CLOSE
            ids.append(token)


def test_bf16_follows_fp32(llama: Path) -> None:
    """Log-probabilities in bf16 stay near those of fp32 on the same tokens."""
    prompt = prompts(seed=2)[0]
    seen = {}
    for precision in ("fp32", "bf16"):
        with Engine.open(llama, max_batch=2, precision=precision) as engine:
            events = [event for _, event in engine.generate([prompt], max_tokens=1, logprobs=True)]
            seen[precision] = events[0].logprob
    assert seen["fp32"] is not None and seen["bf16"] is not None
    assert abs(seen["fp32"] - seen["bf16"]) < 0.2
