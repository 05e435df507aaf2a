"""A step of training waits for the device once, on every kind of layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright import launch
from meshwright.launch import Context
from meshwright.layout import Execution, Layout
from tests.waits import Waits

LAYOUTS = {
    "data": Layout(dp=2, shard=2, micro_batch=2),
    "tensor": Layout(tp=2, sequence_parallel=True, micro_batch=4),
    "pipeline": Layout(pp=2, micro_batch=2),
}


class HeldOut:
    """A manifest's held-out part: two batches."""

    held_out_samples = 16

    def __init__(self, read: Callable[..., Mapping[str, Any]]) -> None:
        self._read = read

    def held_out(self, start: int, count: int) -> Mapping[str, Any]:
        return self._read(1, start % 8, start % 8 + count)

    def held_out_bytes(self, start: int, count: int) -> int:
        return count


def waits(layout: Layout, context: Context, name: str = "") -> dict[str, list[str]]:
    """Where the second step of a small language model waits, and its evaluation."""
    from meshwright import tasks
    from meshwright.families.llama.card import LlamaShape, card
    from meshwright.families.llama.module import build
    from meshwright.parallel import apply, start
    from meshwright.train.loop import Trainer
    from meshwright.train.model import initial_values
    from tests.worlds import GLOBAL_BATCH, SEQ_LEN, SHAPES, RandomTokens, even_stages, job

    torch.set_num_threads(1)
    shape = LlamaShape(**SHAPES["plain"])
    paper = card(shape, SEQ_LEN)
    batches = {
        step: {name: values.numpy() for name, values in RandomTokens(shape.vocab).batch(step, 0, GLOBAL_BATCH).items()}
        for step in (1, 2)
    }

    def read(step: int, start: int, stop: int) -> dict[str, Any]:
        return {name: values[start:stop] for name, values in batches[step].items()}

    with start(layout, context, timeout_seconds=60, name=name) as mesh:
        with torch.device("meta"):
            module = build(shape)
        stages = even_stages([block.name for block in paper.blocks], layout.pp)
        applied = apply(Execution(layout, stages, "fp32"), paper, module, mesh)
        applied.fill(initial_values(0, module.init_rule))
        trainer = Trainer(job(3), paper, applied, mesh, tasks.get("language-model"), read)
        trainer.job.train.eval_batches = 2
        trainer.step(1)  # the first one learns the shapes of a pipeline
        with Waits() as step:
            trainer.step(2)
        trainer.evaluate(HeldOut(read), 2)  # type: ignore[arg-type]
        with Waits() as evaluation:
            trainer.evaluate(HeldOut(read), 2)  # type: ignore[arg-type]
    return {"step": step.found, "evaluation": evaluation.found}


def work(payload: Mapping[str, Any], context: Context) -> dict[str, dict[str, list[str]]]:
    """What a started process runs: its rank of every layout."""
    return {name: waits(layout, context, name) for name, layout in LAYOUTS.items()}


def test_one_device_waits_once() -> None:
    assert waits(Layout(micro_batch=4), Context.alone()) == {"step": ["tolist"], "evaluation": ["tolist"]}


def test_each_rank_of_a_layout_waits_once(tmp_path: Path) -> None:
    with launch.local("tests.train.test_waits:work", {}, 2, tmp_path, env={"OMP_NUM_THREADS": "1"}) as started:
        answers = started.wait(200)
    once = {"step": ["tolist"], "evaluation": ["tolist"]}
    assert answers == [dict.fromkeys(LAYOUTS, once)] * 2


@pytest.mark.parametrize(
    ("word", "operation"),
    [
        ("item", lambda x: float(x[0])),
        ("item", lambda x: bool(x[0] > 0)),
        ("item", lambda x: x[torch.tensor(1)]),
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("to", lambda x: x.to("cpu")),
        ("to", lambda x: x.to(torch.device("cpu"), torch.float64)),
        ("tensor", lambda x: torch.tensor([1.0], device=x.device)),
        ("nonzero", lambda x: x.nonzero()),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("index by a mask", lambda x: x[x > 0]),
    ],
)
def test_what_waits_is_seen(word: str, operation: Callable[[Tensor], Any]) -> None:
    with Waits() as waits:
        operation(torch.arange(3.0))
    assert waits.found[:1] == [word]


def test_what_is_queued_is_not_counted() -> None:
    with Waits() as waits:
        x = torch.tensor([1.0, 2.0]).to("cpu", non_blocking=True).to(torch.float64)
        x[0] = x.sum() * 2.0
        x.masked_fill(x > 1, 0.0).where(x > 0, x)
    assert waits.found == []
