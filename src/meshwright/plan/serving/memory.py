"""Memory of one device of a replica while it serves, and the number of sequences that its cache can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.plan.serving.time import WEIGHT_BYTES, StepModel

#: The share of the memory beside the weights that slots may take (as in engine/engine.py).
_SLOT_SHARE = 0.5


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one device of the fullest stage, and the tokens and sequences of its cache.

    `page_tokens` is 0 where a sequence has one slot of `longest` tokens. At most `sequences` fit at once. `needed` is
    the minimum: the weights (all copies that exist while they are loaded), the buffers of a step, and one sequence.
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


def serving_memory(
    model: StepModel, request_tokens: int, batch: int, longest: int, slot_tokens: int | None = None
) -> ServingMemory:
    """The memory of `model` with `batch` sequences of `request_tokens`, none longer than `longest`. A slot has room for
    at least `slot_tokens` (default: `longest`)."""
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
    cache = int(tokens * token)
    return ServingMemory(
        weights, workspace, activations, cache, token, page, pages, tokens, sequences, longest, needed, usable
    )


def _activations(model: StepModel, batch: int) -> int:
    """Bytes of a step's buffers: rows of a chunk and of the batch, the logits of the batch, and what is widened."""
    shape = model.shape
    rows = model.server.chunk_tokens + batch / model.spread
    width = max(shape.ffn, shape.top_k * (shape.expert_ffn or shape.ffn) if shape.experts else 0)
    each = 6 * shape.hidden + (shape.q_width + 2 * shape.kv_width + 3 * width) / model.split
    element = WEIGHT_BYTES["fp32"] if model.widens else model.wide_bytes
    widened = model.server.widened_bytes if model.widens else 0
    return math.ceil(rows * each * element + 8 * batch * shape.vocab / model.split + widened)
