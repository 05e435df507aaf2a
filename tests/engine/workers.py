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
