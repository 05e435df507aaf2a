"""What goes into the engine and what comes out: Request and TokenEvent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.errors import InputError, Problem


@dataclass(frozen=True)
class Request:
    """One completion to make. `temperature` 0 is greedy; then `top_k`, `top_p`, `min_p` and `seed` do nothing.

    `max_tokens` None means as many as fit. `top_k` 0 is off. A request with a `seed` gives the same tokens whatever
    else runs beside it; without one every request draws its own. `stop_ids` end the completion beside the model's own
    end-of-sequence ids, which `ignore_eos` switches off. `logprobs` asks for the log-probability of every token.
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

    `finish_reason` is None while the request goes on, "length" after its last token, or "stop" when `token` is a stop
    id (and so no part of the text). `logprob` is ln p(token) before temperature and cuts, if it was asked for.
    """

    id: int
    token: int
    finish_reason: str | None = None
    logprob: float | None = None


def check(request: Request, vocab: int, max_len: int) -> None:
    """Raises InputError listing everything in `request` that a model of `vocab` ids and `max_len` tokens cannot do."""
    problems = [*_check_room(request, vocab, max_len), *_check_sampling(request)]
    if problems:
        raise InputError(problems)


def _check_room(request: Request, vocab: int, max_len: int) -> list[Problem]:
    prompt, limit, found = len(request.prompt_ids), request.max_tokens, []
    if prompt == 0:
        found.append(Problem("prompt", "is empty", "give at least one token"))
    if prompt >= max_len:
        what = f"has {prompt} tokens; this engine holds {max_len} a request, prompt and completion together"
        found.append(Problem("prompt", what, f"at most {max_len - 1}"))
    elif limit is not None and limit < 1:
        found.append(Problem("max_tokens", f"is {limit}", "at least 1"))
    elif limit is not None and prompt + limit > max_len:
        what = f"{limit} after a prompt of {prompt} is past this engine's limit of {max_len} tokens"
        found.append(Problem("max_tokens", what, f"at most {max_len - prompt}"))
    wrong = _ids_outside(request.prompt_ids, vocab)
    if wrong:
        found.append(Problem("prompt", f"holds token id {wrong[0]}", f"ids are 0 to {vocab - 1}"))
    return found


def _ids_outside(ids: Sequence[int], vocab: int) -> list[object]:
    return [token for token in ids if type(token) is not int or not 0 <= token < vocab]


def _check_sampling(request: Request) -> list[Problem]:
    found = []
    if not (math.isfinite(request.temperature) and request.temperature >= 0):
        found.append(Problem("temperature", f"is {request.temperature}", "0 (greedy) or more"))
    if not 0 < request.top_p <= 1:
        found.append(Problem("top_p", f"is {request.top_p}", "above 0, at most 1"))
    if not 0 <= request.min_p <= 1:
        found.append(Problem("min_p", f"is {request.min_p}", "0 to 1"))
    if request.top_k < 0:
        found.append(Problem("top_k", f"is {request.top_k}", "0 (off) or more"))
    return found
