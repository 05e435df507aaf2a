"""Two real processes, each with half of every weight, complete as one does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshwright import launch
from meshwright.engine import Engine
from meshwright.errors import CannotWork


@dataclass(frozen=True)
class Alone:
    rank: int
    world: int


@pytest.mark.parametrize("kind", ["llama_tied_biased", "qwen3"])
def test_tp2_equals_tp1(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(199) for _ in range(length)] for length in (3, 30, 150, 7)]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    started = launch.local(
        "workers:complete",
        {"folder": str(folder_of(kind)), "prompts": prompts, "new": 12},
        processes=2,
        folder=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
    )
    with started:
        split, other = started.wait(timeout_seconds=120)
    assert other is None
    whole: list[list[int]] = [[] for _ in prompts]
    with Engine.open(folder_of(kind), max_batch=3) as engine:
        for index, event in engine.generate(prompts, max_tokens=12):
            whole[index].append(event.token)
    assert split == whole


def test_heads_that_do_not_divide_are_refused(llama: Path) -> None:
    with pytest.raises(CannotWork, match="tp=4 does not divide kv_heads=2; nearest: tp=2"):
        Engine.open(llama, context=Alone(0, 4))
