"""Model families: each a folder of two files, the card (no torch) and the module.

`shape_of_job` reads the shape of a job's model, from its `[model]` table or from a Hugging Face folder. `card_of_job`
knows more models than that: decoders that are planned and not trained (decoder.py) have a card and no module.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.card import Card
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.families.decoder_config import kind_of
from meshwright.families.decoder_shape import DecoderShape
from meshwright.families.llama import card as llama

_CONFIG_BYTES = 4 * 2**20  # largest config.json that is read


def card_of_job(job: Any, style: str = "plain") -> Card:
    """The card of a job with `model.family` or `model.hf`, of a family of ours or of any decoder that can be planned.

    `style` says who computes it (decoder_saved.py): another framework keeps other activations of the same model.
    Raises InputError where the folder or lengths are wrong, or the kind of model is not known.
    """
    seq_len = job.data.seq_len or 1
    if job.model.hf is not None:
        path = Path(job.model.hf) / "config.json"
        config = read_config(path)
        if config.get("model_type") not in llama.ARCHITECTURES:
            from meshwright.families import decoder, decoder_hf

            return decoder.card(decoder_hf.shape_from_hf_config(config, str(path)), seq_len, style)
    shape = shape_of_job(job)
    if style == "plain":
        return llama.card(shape, seq_len)
    from meshwright.families import decoder

    return decoder.card(_as_decoder(shape), seq_len, style)


#: What a LlamaShape and a DecoderShape both say.
_SHARED = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "qk_norm", "sliding_window")


def _as_decoder(shape: llama.LlamaShape) -> DecoderShape:
    biases = (*(("qkv",) if shape.attention_bias else ()), *(("out",) if shape.output_bias else ()))
    same = {name: getattr(shape, name) for name in _SHARED}
    return DecoderShape(**same, bias_of=biases, hf_type=shape.hf_type)


def own_card(shape: DecoderShape, seq_len: int) -> Card | None:
    """The card of our own model of that shape, which says what our modules keep; None where we have no such model."""
    bias = "qkv" in shape.bias_of
    kind = shape.hf_type or ("qwen3" if shape.qk_norm else "llama")
    same = {name: getattr(shape, name) for name in _SHARED}
    ours = llama.LlamaShape(**same, attention_bias=bias, hf_type=kind)
    return llama.card(ours, seq_len) if _as_decoder(ours) == replace(shape, hf_type=kind) else None


def require_trainable(job: Any) -> None:
    """Raises CannotWork where a job's model has a card and no module: it can be planned, for others to train."""
    if job.model.module is not None or job.model.hf is None:
        return
    from meshwright.families import decoder_hf

    path = Path(job.model.hf) / "config.json"
    kind = read_config(path).get("model_type")
    if kind not in llama.ARCHITECTURES and kind in decoder_hf.KINDS:
        what = f"{path} is a {kind}, which can be planned and not trained"
        hint = f"trained are {', '.join(llama.ARCHITECTURES)}, or any nn.Module of yours: model.module"
        raise CannotWork(Problem("model.hf", what, hint))


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
    """The JSON object in `path`. Raises InputError where it cannot be read as one, or its `model_type` is no text."""
    try:
        with open(path, "rb") as file:
            text = file.read(_CONFIG_BYTES + 1)
        content = json.loads(text) if len(text) <= _CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(Problem(str(path), f"cannot be read as JSON: {error}")) from None
    if not isinstance(content, dict):
        raise InputError(Problem(str(path), "is not a JSON object of a sensible size"))
    kind_of(content, str(path))
    return content
