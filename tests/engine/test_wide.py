"""Weights in bf16 on a CPU that is slow at it: steps of many rows are computed in fp32, and their numbers are right."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright import launch
from meshwright.checkpoint import read_model_folder
from meshwright.engine import Engine, engine, products
from meshwright.engine.folder import read_model_config
from meshwright.families.decoder import parameters
from meshwright.families.llama.card import hf_names
from meshwright.families.llama.module import Llama, build
from meshwright.layout import Box
from meshwright.placement import Placement

#: As a laptop without instructions for bf16.
SLOW = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
#: Largest error of a log-probability: that of weights, keys and values in bf16, and of activations in bf16 too.
IN_FP32, IN_BF16 = 0.05, 0.15


@dataclass(frozen=True)
class Work:
    """What workers.py's `logprobs` needs: prompts that join one step after another, of which the second and third are
    read beside those that decode."""

    folder: str
    prompts: tuple[tuple[int, ...], ...]
    new: int = 4

    @classmethod
    def of(cls, folder: Path) -> Work:
        draw = random.Random(5)
        return cls(str(folder), tuple(tuple(draw.randrange(199) for _ in range(size)) for size in (40, 5, 23)))


def reference(folder: Path) -> Llama:
    """The plain module in fp32, with the folder's weights rounded to bf16."""
    shape = read_model_config(folder).shape
    module = build(shape)
    held = dict(module.named_parameters())
    wanted = {p.name: (Placement(p.name, Box.whole(p.shape), 1, True), held[p.name]) for p in parameters(shape)}
    read_model_folder(folder, hf_names(shape), wanted)
    return module.to(torch.bfloat16).float()


@torch.no_grad()
def errors(folder: Path, work: Work, answers: list[list[list[float]]]) -> tuple[float, float]:
    """Largest error of the log-probabilities of first tokens, whose steps read the prompt, and of later ones.

    answers: for each prompt [token, log-probability] of each new token.
    """
    module = reference(folder)
    worst = [0.0, 0.0]
    for prompt, answer in zip(work.prompts, answers, strict=True):
        assert len(answer) == work.new
        ids = [*prompt, *(int(token) for token, _ in answer)]
        logits = module(torch.tensor([ids]), positions=torch.arange(len(ids))[None])[0]
        for at, (token, logprob) in enumerate(answer):
            right = float(logits[len(prompt) + at - 1].log_softmax(-1)[int(token)])
            worst[at > 0] = max(worst[at > 0], abs(logprob - right))
    return worst[0], worst[1]


def test_ranks_on_a_cpu_without_fast_bf16_equal_the_plain_module(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("llama_tied_biased")
    work = Work.of(folder)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with launch.local("workers:logprobs", vars(work), 2, tmp_path, env=SLOW) as started:
        answer: Mapping[str, Any] = started.wait(timeout_seconds=120)[0]
    assert answer["capability"] == "AVX2"
    assert answer["dtypes"] == {"1": "torch.bfloat16", "7": "torch.bfloat16", "8": "torch.float32"}
    first, later = errors(folder, work, answer["logprobs"])
    assert first < IN_FP32 and later < IN_BF16


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_prompts_beside_decoding_equal_the_plain_module(
    kind: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from workers import run_logprobs  # as the processes of a run import it

    monkeypatch.setattr(engine, "widens", lambda *_: True)
    work = Work.of(folder_of(kind))
    with Engine.open(work.folder, max_batch=3, precision="bf16") as opened:
        first, later = errors(Path(work.folder), work, run_logprobs(opened, work.prompts, work.new))
    assert first < IN_FP32 and later < IN_BF16


def test_the_choice_follows_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for flags, slow in (("avx2", True), ("avx2 avx512f", True), ("avx2 avx512f avx512_bf16", False)):
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu {flags}\n")
        monkeypatch.setattr("meshwright.cluster.CPUINFO", tmp_path / "cpuinfo")
        assert products.widens(torch.bfloat16, cpu) is slow
        assert not products.widens(torch.float32, cpu) and not products.widens(torch.bfloat16, gpu)


def test_a_widened_product_is_that_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in blocks of 3, the last one shorter; and rows in bf16 are multiplied in bf16."""
    monkeypatch.setattr(products, "WIDENED_BYTES", 4 * 12 * 3)
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=draw).bfloat16() for size in ((10, 12), (10,)))
    x, y = torch.randn(9, 12, generator=draw), torch.randn(9, 10, generator=draw)
    right = x @ weight.float().t() + bias.float()
    linear = products.Linear(weight, bias, widens=True)
    results: list[tuple[Tensor, Tensor]] = [
        (linear.plain()(x), right),
        (linear.silu()(x), F.silu(right)),
        (linear.times()(x, y), right * y),
        (linear.plus()(x, y), right + y),
        (linear.plain()(x.bfloat16()), F.linear(x.bfloat16(), weight, bias)),
    ]
    for ours, theirs in results:
        torch.testing.assert_close(ours, theirs)
