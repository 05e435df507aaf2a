"""What the processes of test_ranks.py run."""

from __future__ import annotations

from typing import Any

import torch

from meshwright.engine import Engine, Request


def complete(payload: dict[str, Any], context: Any) -> list[list[int]] | None:
    """Rank 0: greedy completions of the prompts, joining at different times, after one is cancelled; others: None."""
    torch.set_num_threads(1)
    engine = Engine.open(payload["folder"], max_batch=3, context=context)
    if context.rank > 0:
        engine.follow()
        return None
    with engine:
        out: dict[int, list[int]] = {}
        gone = engine.submit(Request((1, 2, 3), max_tokens=50))
        ids = []
        for prompt in payload["prompts"]:
            ids.append(engine.submit(Request(tuple(prompt), max_tokens=payload["new"])))
            for event in engine.step():
                out.setdefault(event.id, []).append(event.token)
            engine.cancel(gone)
        while engine.running or engine.waiting:
            for event in engine.step():
                out.setdefault(event.id, []).append(event.token)
        return [out[id] for id in ids]


def logprobs(payload: dict[str, Any], context: Any) -> dict[str, Any] | None:
    """Rank 0: what test_wide.py compares, of a model in bf16; others: None."""
    with Engine.open(payload["folder"], max_batch=3, precision="bf16", context=context) as engine:
        if context.rank > 0:
            engine.follow()
            return None
        suited = {str(rows): str(engine._decoder._suited(torch.zeros(rows, 64)).dtype) for rows in (1, 7, 8)}
        return {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "dtypes": suited,
            "logprobs": run_logprobs(engine, payload["prompts"], payload["new"]),
        }


def run_logprobs(engine: Engine, prompts: Any, new: int) -> list[list[list[float]]]:
    """Greedy completions of prompts that join one step after another: [token, log-probability] of each new token."""
    out: dict[int, list[list[float]]] = {}
    for prompt in prompts:
        out[engine.submit(Request(tuple(prompt), max_tokens=new, logprobs=True))] = []
        _collect(engine, out)
    while engine.running or engine.waiting:
        _collect(engine, out)
    return list(out.values())


def _collect(engine: Engine, out: dict[int, list[list[float]]]) -> None:
    for event in engine.step():
        assert event.token is not None and event.logprob is not None
        out[event.id].append([event.token, event.logprob])
