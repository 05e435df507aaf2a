"""Model families: each a folder of two files, the card (no torch) and the module.

`config_of_job` and `card_of_job` read a job's model from its `[model]` table or its Hugging Face folder. Some models
have a card and no module: decoders that can be planned and not trained (decoder.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.card import Card
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.families import decoder, decoder_hf
from meshwright.families.decoder_config import kind_of, precision_of
from meshwright.families.decoder_shape import DecoderShape
from meshwright.families.llama import card as llama
from meshwright.files import read_object

if TYPE_CHECKING:
    from meshwright.job import Job

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
_CONFIG_BYTES = 4 * 2**20  # largest config.json that is read

#: Keys of a generation_config.json: those that are followed, or say nothing of the text.
_ANSWERED = (
    *("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "use_cache", "cache_implementation"),
    *("transformers_version", "_from_model_config", "return_dict_in_generate", "output_attentions"),
)
#: Keys that `transformers` uses only where do_sample is true.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

#: Fields of a DecoderShape that our modules support; every other one must have its default.
_MODULE_FIELDS = {
    *("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied", "qk_norm", "sliding_window"),
    *("bias_of", "hf_type"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A model by its config.json or a job's [model] table. `shape` is a LlamaShape for a family of ours, `precision`
    that of the saved weights, `longest` the most tokens of a sequence."""

    shape: DecoderShape
    precision: str
    longest: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    norm_eps: float


def config_of_job(job: Job, *, ours: bool = False) -> ModelConfig:
    """The config of a job with `model.family` or `model.hf`; `ours` accepts only a family of ours.

    Raises InputError if the folder or lengths are wrong, or the kind of model is unknown.
    """
    if job.model.hf is None:  # a checkpoint's model is written in fp32
        return _llama_config(llama.shape_from_job(job.model, job.data.seq_len or 1), "fp32")
    config = config_of_folder(Path(job.model.hf), ours=ours)
    if isinstance(config.shape, llama.LlamaShape) and (job.data.seq_len or 1) > config.longest:
        limit = "positions" if config.longest == config.shape.max_positions else "tokens of the sliding window"
        what = f"{job.data.seq_len} is more than the {config.longest} {limit} of the model in {job.model.hf}"
        raise InputError(Problem("data.seq_len", what, f"nearest: data.seq_len={config.longest}"))
    return config


def config_of_folder(folder: Path, *, ours: bool = False) -> ModelConfig:
    """The config of a Hugging Face folder; `ours` accepts only a family of ours. Raises InputError as `read_config`,
    and if the kind of model is unknown or its config contradicts itself."""
    config, where = read_config(folder / CONFIG_NAME), str(folder / CONFIG_NAME)
    if ours or config.get("model_type") in llama.ARCHITECTURES:
        return _llama_config(llama.shape_from_hf(config, where), precision_of(config))
    shape = decoder_hf.shape_from_hf_config(config, where)
    return ModelConfig(shape, *decoder_hf.numbers_of(config, where))


def _llama_config(shape: llama.LlamaShape, precision: str) -> ModelConfig:
    return ModelConfig(shape, precision, shape.longest, shape.rope_theta, shape.rope_scaling, shape.norm_eps)


def shape_of_job(job: Job) -> llama.LlamaShape:
    """The shape of a job with `model.family`, or `model.hf` of a family of ours. Raises InputError as config_of_job."""
    shape = config_of_job(job, ours=True).shape
    assert isinstance(shape, llama.LlamaShape)
    return shape


def card_of_job(job: Job, style: str = "plain") -> Card:
    """The card of a job with `model.family` or `model.hf`, of a family of ours or of any decoder that can be planned.

    `style` is the framework that computes it (decoder_saved.py), which decides the saved activations.
    Raises InputError as `config_of_job`.
    """
    shape, seq_len = config_of_job(job).shape, job.data.seq_len or 1
    if style == "plain" and isinstance(shape, llama.LlamaShape):
        return llama.card(shape, seq_len)
    return decoder.card(shape, seq_len, style)


def own_card(shape: DecoderShape, seq_len: int) -> Card | None:
    """The card of our own model of that shape, with what our modules keep; None if we have no such model."""
    kind = shape.hf_type or ("qwen3" if shape.qk_norm else "llama")
    supported = all(
        field.name in _MODULE_FIELDS or getattr(shape, field.name) == field.default for field in fields(DecoderShape)
    )
    if not supported or shape.bias_of not in ((), llama.biases(kind, True)):
        return None
    return llama.card(llama.LlamaShape(**{**vars(shape), "hf_type": kind}), seq_len)


def require_trainable(job: Job) -> None:
    """Raises CannotWork if a job's model has a card and no module: it can be planned and not trained. Raises it for
    dropout, too, which the folder's model has in training and ours does not."""
    if job.model.module is not None or job.model.hf is None:
        return
    path = Path(job.model.hf) / CONFIG_NAME
    config = read_config(path)
    kind = config.get("model_type")
    if kind in llama.ARCHITECTURES and config.get("attention_dropout"):
        what = f"{path} has attention_dropout {config['attention_dropout']!r}, and we train without dropout"
        raise CannotWork(Problem("model.hf", what, "set it to 0 in config.json"))
    if kind not in llama.ARCHITECTURES and kind in decoder_hf.KINDS:
        what = f"{path} is a {kind}, which can be planned and not trained"
        hint = f"trained are {', '.join(llama.ARCHITECTURES)}, or any nn.Module of yours: model.module"
        raise CannotWork(Problem("model.hf", what, hint))


def vocab_of_folder(folder: Path) -> int | None:
    """Rows of the embedding of the model in a Hugging Face folder; None if its config does not say."""
    vocab = read_config(folder / CONFIG_NAME).get("vocab_size")
    return vocab if isinstance(vocab, int) else None


def end_ids(folder: Path, shape: llama.LlamaShape) -> tuple[int, ...]:
    """Ids that end a completion of the model in a Hugging Face folder: of generation_config.json, else of its config.

    Raises InputError if these are no token ids.
    """
    eos: Any = shape.eos_id
    if (folder / GENERATION_NAME).exists():
        eos = read_config(folder / GENERATION_NAME).get("eos_token_id", eos)
    ids = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    if any(type(id) is not int for id in ids):
        raise InputError(Problem(str(folder), f"eos_token_id is {eos!r}", "a token id or a list of them"))
    return tuple(ids)


def sampling_settings(folder: Path) -> dict[str, Any]:
    """What the generation_config.json of a Hugging Face folder says of how text is generated beside its end, and is not
    neutral: `generate` and `serve` do not follow it, for a request says all that."""
    if not (folder / GENERATION_NAME).exists():
        return {}
    said = read_config(folder / GENERATION_NAME)
    unused = () if said.get("do_sample") else _OF_SAMPLING
    return {
        key: value
        for key, value in said.items()
        if value not in (None, False, 0, 1, "", [], {}) and key not in (*_ANSWERED, *unused)
    }


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises InputError if it is not a JSON object, or its `model_type` is not text."""
    content = read_object(path, _CONFIG_BYTES)
    kind_of(content, str(path))
    return content
