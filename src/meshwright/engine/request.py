"""The engine's input and output: Request and TokenEvent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.errors import InputError, Problem


@dataclass(frozen=True)
class Request:
    """One completion to make. `temperature` 0 is greedy; `top_k`, `top_p`, `min_p` and `seed` then have no effect.

    `max_tokens` None is the engine's limit. `top_k` 0 is off. A request with a `seed` gives the same tokens whatever
    runs beside it; without one the seed is random. `stop_ids` end the completion, as do the model's own
    end-of-sequence ids unless `ignore_eos`. `logprobs` asks for the log-probability of every token.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request, as soon as it is sampled.

    `finish_reason` is "length" for the last token, "stop" if `token` is a stop id (not part of the text), "error" if
    there is no token (it is then -1) because the logits are not finite, otherwise None. `logprob` is ln p(token) before
    temperature and cuts, if the request asks for it.
    """

    id: int
    token: int
    finish_reason: str | None = None
    logprob: float | None = None


def check(request: Request, vocab: int, max_len: int) -> None:
    """Raises InputError listing all that a model of `vocab` ids and `max_len` tokens cannot do of `request`."""
    problems = [*_check_room(request, vocab, max_len), *_check_sampling(request)]
    if problems:
        raise InputError(problems)


def _check_room(request: Request, vocab: int, max_len: int) -> list[Problem]:
    prompt, limit, problems = len(request.prompt_ids), request.max_tokens, []
    if prompt == 0:
        problems.append(Problem("prompt", "is empty", "give at least one token"))
    if prompt >= max_len:
        what = f"has {prompt} tokens; a request has room for {max_len}, prompt and completion together"
        problems.append(Problem("prompt", what, f"at most {max_len - 1}"))
    elif limit is not None and limit < 1:
        problems.append(Problem("max_tokens", f"is {limit}", "at least 1"))
    elif limit is not None and prompt + limit > max_len:
        what = f"{limit} after a prompt of {prompt} is past this engine's limit of {max_len} tokens"
        problems.append(Problem("max_tokens", what, f"at most {max_len - prompt}"))
    wrong = [token for token in request.prompt_ids if type(token) is not int or not 0 <= token < vocab]
    if wrong:
        problems.append(Problem("prompt", f"holds token id {wrong[0]}", f"ids are 0 to {vocab - 1}"))
    return problems


def _check_sampling(request: Request) -> list[Problem]:
    problems = []
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        problems.append(Problem("temperature", f"is {request.temperature}", "0 (greedy) or more"))
    if not 0 < request.top_p <= 1:
        problems.append(Problem("top_p", f"is {request.top_p}", "above 0, at most 1"))
    if not 0 <= request.min_p <= 1:
        problems.append(Problem("min_p", f"is {request.min_p}", "0 to 1"))
    if request.top_k < 0:
        problems.append(Problem("top_k", f"is {request.top_k}", "0 (off) or more"))
    return problems
