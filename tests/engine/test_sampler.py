"""Sampling: the cuts, the distribution, and the log-probabilities."""

from __future__ import annotations

import random

import pytest
import torch

from meshwright.engine.request import Request
from meshwright.engine.sampler import draw, sample
from meshwright.engine.scheduler import RunningRequest

LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]))


def drawn(**fields: float) -> set[int]:
    request = Request(prompt_ids=(1,), temperature=1.0, **fields)  # type: ignore[arg-type]
    return {int(draw(LOGITS, request, step / 1000)) for step in range(1000)}


def test_no_cut_reaches_every_token() -> None:
    assert drawn() == {0, 1, 2, 3, 4}


def test_top_k() -> None:
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_is_the_fewest_that_hold_it() -> None:
    assert drawn(top_p=0.3) == {1}
    assert drawn(top_p=0.6) == {1, 2}
    assert drawn(top_p=0.84) == {1, 2, 3}


def test_min_p_is_relative_to_the_best() -> None:
    assert drawn(min_p=0.45) == {1, 2, 3}


def test_cuts_combine() -> None:
    assert drawn(top_k=4, min_p=0.3, top_p=0.8) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    request = Request(prompt_ids=(1,), temperature=temperature)
    steps = 4000
    counts = torch.zeros(5)
    for step in range(steps):
        counts[draw(LOGITS, request, (step + 0.5) / steps)] += 1
    assert torch.allclose(counts / steps, torch.softmax(LOGITS / temperature, -1), atol=2e-3)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    for chance in (0.0, 0.5, 1 - 2**-53):
        assert draw(logits, Request(prompt_ids=(1,), temperature=1.0), chance) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-308, 1e-310, 5e-324])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}])
@pytest.mark.parametrize("shift", [0.0, -80.0, 3e38])
def test_the_smallest_temperatures_are_greedy(temperature: float, cuts: dict[str, float], shift: float) -> None:
    request = Request(prompt_ids=(1,), temperature=temperature, **cuts)  # type: ignore[arg-type]
    logits = torch.tensor([0.0, 0.5, -1e30, -torch.inf, 0.25]).double() + shift
    if shift == 3e38:
        logits[1] *= 1.1
    assert {int(draw(logits, request, chance)) for chance in (0.0, 0.5, 1 - 2**-53)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_has_no_token(temperature: float) -> None:
    wrong = [[1.0, torch.nan], [torch.inf, 1.0], [-torch.inf, -torch.inf]]
    request = Request(prompt_ids=(1,), temperature=temperature, logprobs=True)
    asked = [RunningRequest(row, request, 1, frozenset(), random.Random(0)) for row in range(4)]
    tokens, logprobs = sample(torch.tensor([*wrong, [-torch.inf, 1.0]]), asked)
    assert tokens == [None, None, None, 1] and logprobs == [None, None, None, 0.0]


def test_greedy_and_logprobs() -> None:
    wanted = RunningRequest(0, Request(prompt_ids=(1,), logprobs=True), 1, frozenset(), random.Random(0))
    silent = RunningRequest(1, Request(prompt_ids=(1,)), 1, frozenset(), random.Random(0))
    tokens, logprobs = sample(torch.stack((LOGITS, LOGITS)) + 3.0, [wanted, silent])
    assert tokens == [1, 1]
    assert logprobs[0] == pytest.approx(-0.9163, abs=1e-3) and logprobs[1] is None
