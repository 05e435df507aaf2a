"""`generate`: continue one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    emit: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues `prompt`; `emit` gets the text as it comes. `temperature` 0 is greedy.

    `model` is a run, a checkpoint or a Hugging Face folder, or the URL of one in a store.

    Returns {"text", "tokens", "finish_reason", "seconds"}. Raises InputError for a folder without a model, or
    a prompt that is not text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # of bytes on the command line that are not text, or half a surrogate pair
        raise InputError(Problem("prompt", f"is not UTF-8 text: character {error.start + 1}")) from error
    from meshwright.engine import Engine, TextStream
    from meshwright.engine.folder import find_model
    from meshwright.serve.workers.text import TextTokenizer
    from meshwright.storage import local_model

    folder = find_model(local_model(model))
    tokenizer = TextTokenizer(folder)
    with Engine.open(folder, max_batch=1) as engine:
        ids = tokenizer.encode(prompt, add_special=True)
        stream = TextStream(tokenizer.decode, prompt=ids, special=tokenizer.special)
        pieces, reason, tokens = [], None, 0
        begin = time.perf_counter()
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        for _, event in engine.generate([ids], **sampling):
            tokens, reason = tokens + 1, event.finish_reason
            piece = "" if reason == "stop" else stream.push(event.token)
            piece += stream.finish() if reason else ""
            pieces.append(piece)
            if emit is not None and piece:
                emit(piece)
        seconds = time.perf_counter() - begin
    return {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, "seconds": seconds}
