"""A decoding step waits for the device once, however its requests choose their tokens."""

from __future__ import annotations

from pathlib import Path

from meshwright.engine import Engine, Request
from tests.waits import Waits

REQUESTS = [
    Request((3, 1, 4), max_tokens=9),
    Request((1, 5, 9, 2), max_tokens=9, temperature=0.7, seed=1),
    Request((6,), max_tokens=9, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=2, logprobs=True),
    Request((5, 3), max_tokens=9, logprobs=True),
]


def test_a_step_waits_once_for_all_its_tokens(llama: Path) -> None:
    with Engine.open(llama, max_batch=4) as engine:
        for request in REQUESTS:
            engine.submit(request)
        while len(engine.step()) < len(REQUESTS):
            pass
        with Waits() as waits:
            events = engine.step()
    assert len(events) == len(REQUESTS) and waits.found == ["tolist"]


def test_reading_a_prompt_waits_only_for_its_first_token(llama: Path) -> None:
    with Engine.open(llama, max_batch=2) as engine:
        engine.submit(REQUESTS[0])
        with Waits() as waits:
            assert len(engine.step()) == 1
    assert waits.found == ["tolist"]
