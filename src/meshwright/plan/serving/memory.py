"""Bytes that one device of a replica holds while it serves, and how many sequences its cache has room for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.plan.serving.time import StepModel

#: Of the memory left beside the weights, the most that slots may come to hold (what engine/engine.py does).
_SLOT_SHARE = 0.5


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one device of the fullest stage, and the room for keys and values beside them.

    `page_tokens` is 0 where a sequence has one slot of `longest` tokens. `sequences` is how many fit at once at most.
    `needed` is what it takes at least: the weights, as often as they stand there while they are loaded, what a step
    works in, and one sequence.
    """

    weights: int
    workspace: int
    activations: int
    cache: int
    token_bytes: float
    page_tokens: int
    pages: int
    tokens: int
    sequences: int
    longest: int
    needed: int
    usable: int

    @property
    def fits(self) -> bool:
        """Whether the model and one sequence fit."""
        return self.needed <= self.usable and self.sequences >= 1

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def serving_memory(
    model: StepModel, request_tokens: int, batch: int, longest: int, slot_tokens: int | None = None
) -> ServingMemory:
    """What `model` holds for `batch` sequences of `request_tokens`, none longer than `longest`.

    Where sequences have slots, one has room for `slot_tokens` at least (default: `longest`).
    """
    server = model.server
    usable = int(model.device.memory_bytes * server.usable)
    weights = math.ceil(model.rank_weight_bytes)
    workspace = int(model.profile[f"serving.{model.kind}.workspace_bytes"])
    activations = _activations(model, batch)
    token = model.cache_token_bytes
    at_rest = usable - weights - workspace - activations
    loading = usable - weights * server.weight_copies - workspace
    if server.page_tokens:
        page = server.page_tokens
        least = math.ceil(request_tokens / page) * page
        pages = int(max(0, at_rest) // (token * page))
        sequences, tokens = pages * page // least, pages * page
        room = pages * page * token
    else:
        page = pages = 0
        room = _SLOT_SHARE * max(0, usable - weights - workspace)
        least = min(longest, slot_tokens or longest)
        sequences = int(room // (least * token))
        if not sequences and slot_tokens and room >= request_tokens * token:
            sequences = 1
        longest = min(longest, max(least if sequences > 1 else 1, int(room // (token * max(1, batch)))))
        tokens = max(1, batch) * longest
    needed = math.ceil(usable - min(at_rest, loading) + (least if page else request_tokens) * token)
    return ServingMemory(
        weights,
        workspace,
        activations,
        int(tokens * token),
        token,
        page,
        pages,
        tokens,
        sequences,
        longest,
        needed,
        usable,
    )


def _activations(model: StepModel, batch: int) -> int:
    """What a step works in: rows of a chunk and of the batch, and the logits of the batch."""
    shape = model.shape
    rows = model.server.chunk_tokens + batch / model.spread
    width = max(shape.ffn, shape.top_k * (shape.expert_ffn or shape.ffn) if shape.experts else 0)
    each = 6 * shape.hidden + (shape.q_width + 2 * shape.kv_width + 3 * width) / model.split
    return math.ceil(rows * each * model.wide_bytes + 8 * batch * shape.vocab / model.split)
