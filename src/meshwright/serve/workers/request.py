"""The request of one sequence, from a protocol to the engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    `prompt` is text or token ids; with `add_special` the tokenizer adds its special tokens (a rendered chat has them
    already); `max_tokens` None fills the context; `top_k` and `min_p` 0 are off; `seed` None is random. The answer ends
    before any text of `stop`, and at the model's end token unless `ignore_eos`.
    """

    prompt: str | tuple[int, ...]
    add_special: bool = True
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
