"""Model families: each a folder of two files, the card (no torch) and the module.

`shape_of_job` reads the shape of a job's model, from its `[model]` table or from a Hugging Face folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.families.llama import card as llama

_CONFIG_BYTES = 4 * 2**20  # largest config.json that is read


def shape_of_job(job: Any) -> llama.LlamaShape:
    """The shape of a job with `model.family` or `model.hf`. Raises InputError where the folder or lengths are wrong."""
    if job.model.hf is None:
        return llama.shape_from_job(job.model, job.data.seq_len or 1)
    path = Path(job.model.hf) / "config.json"
    shape = llama.shape_from_hf(read_config(path), str(path))
    window = shape.sliding_window or shape.max_positions
    longest = min(window, shape.max_positions)
    if (job.data.seq_len or 1) > longest:
        # Within its window a model with sliding-window attention is an ordinary one; past it ours would be another.
        limit = "positions" if longest == shape.max_positions else "tokens of the sliding window"
        what = f"{job.data.seq_len} is more than the {longest} {limit} of the model in {job.model.hf}"
        raise InputError(Problem("data.seq_len", what, f"nearest: data.seq_len={longest}"))
    return shape


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError where it cannot be read as one."""
    try:
        with open(path, "rb") as file:
            text = file.read(_CONFIG_BYTES + 1)
        content = json.loads(text) if len(text) <= _CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(Problem(str(path), f"cannot be read as JSON: {error}")) from None
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "is not a JSON object of a sensible size"))
    return content
