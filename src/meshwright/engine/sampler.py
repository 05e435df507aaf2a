"""From logits to tokens. Each request draws from its own generator, so others do not change its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meshwright.engine.request import Request
from meshwright.engine.scheduler import RunningRequest


@torch.inference_mode()
def sample(logits: Tensor, sequences: Sequence[RunningRequest]) -> tuple[list[int | None], list[float | None]]:
    """A token for each row of logits [R, V], and its log-probability if the request asks for it.

    The token is None where the row has no distribution: NaN or +infinity is in it, or nothing but -infinity. Tokens are
    chosen where the logits are and read all at once: only there does the host wait for a GPU.
    """
    best, tokens = logits.max(dim=-1)  # NaN if one is in the row
    finite = best.isfinite()
    asked = []  # rows whose log-probability is wanted
    for row, sequence in enumerate(sequences):
        request = sequence.request
        if request.temperature > 0:
            tokens[row] = draw(logits[row], request, sequence.random.random())
        if request.logprobs:
            asked.append(row)
    found = [tokens.double(), finite.double()]
    for row in asked:
        line = logits[row].float()
        found.append((line.take(tokens[row]) - line.logsumexp(dim=-1)).double()[None])
    numbers = torch.cat(found).tolist()
    rows = len(sequences)
    sound = numbers[rows : 2 * rows]
    logprobs = dict(zip(asked, numbers[2 * rows :], strict=True))
    return (
        [int(token) if sound[row] else None for row, token in enumerate(numbers[:rows])],
        [logprobs.get(row) if sound[row] else None for row in range(rows)],
    )


def draw(logits: Tensor, request: Request, chance: float) -> Tensor:
    """The token, a scalar, at quantile `chance` (0 <= chance < 1) of softmax(logits [V] / temperature), after the
    request's cuts.

    These are, in order: the `top_k` likeliest; of these the fewest likeliest with at least `top_p` of their
    probability; then those at least `min_p` times as likely as the best.
    """
    exact = logits.double()
    scaled = (exact - exact.max()) / request.temperature  # the best is 0, so that no temperature makes it infinite
    if request.top_k == 0 and request.top_p >= 1 and request.min_p == 0:
        probability = torch.softmax(scaled, dim=-1)
        return _at_quantile(probability, chance)
    count = min(request.top_k or scaled.shape[0], scaled.shape[0])
    best, ids = torch.topk(scaled, count)  # likeliest first
    probability = torch.softmax(best, dim=-1)
    keep = torch.ones_like(probability, dtype=torch.bool)
    if request.top_p < 1:
        keep &= probability.cumsum(-1) - probability < request.top_p
    if request.min_p > 0:
        keep &= probability >= request.min_p * probability[0]
    return ids.take(_at_quantile(probability * keep, chance))


def _at_quantile(weights: Tensor, chance: float) -> Tensor:
    """Index at which the cumulative sum of weights [V] passes `chance` of their total; never one of weight 0. Any index
    where a weight is NaN."""
    running = weights.cumsum(-1)
    total = running[-1:]
    index = torch.searchsorted(running, total * chance, right=True)
    last = torch.searchsorted(running, total)  # where it is reached; the product above may round up to it
    return torch.minimum(index, last)[0].clamp_(max=weights.shape[0] - 1)
