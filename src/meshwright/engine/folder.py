"""From a folder to a decoder's weights: the model folder, its config, this rank's slices."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meshwright import checkpoint, families
from meshwright.card import Card
from meshwright.divisors import divisors
from meshwright.engine.ranks import Ranks
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.families.decoder_config import precision_of
from meshwright.families.llama.card import IGNORED_TENSORS, LlamaShape, card, hf_names, shape_from_hf, tied_tensors
from meshwright.layout import Layout, coordinates
from meshwright.placement import Placement, placements

log = logging.getLogger("meshwright")


@dataclass(frozen=True)
class EngineModel:
    """What the engine reads of a Hugging Face folder. `precision` is the element type that its config names."""

    folder: Path
    shape: LlamaShape
    precision: torch.dtype
    eos_ids: frozenset[int]


def find_model(folder: Path) -> Path:
    """The Hugging Face folder for `folder`: itself, a checkpoint's `model/`, or that of a run's newest checkpoint.

    Raises InputError if there is none, or if it is a checkpoint's and a file beside its weights was changed or is gone.
    """
    checkpoint.check_side_files(folder)
    if (folder / families.CONFIG_NAME).exists():
        return folder
    if (folder / "checkpoints").is_dir():
        newest = checkpoint.latest(folder / "checkpoints")
        if newest is None:
            what = "no checkpoint is committed yet"
            raise InputError(Problem(str(folder / "checkpoints"), what, "train until the first one"))
        return find_model(newest)
    if (folder / "model").is_dir():
        return find_model(folder / "model")
    if (folder / "module.json").exists():
        what = "holds a module of yours; the engine decodes the built-in families"
        raise InputError(Problem(str(folder), what, 'family = "llama"'))
    what = "holds no model: no config.json" if folder.is_dir() else "is not a folder"
    raise InputError(Problem(str(folder), what, "name a run, a checkpoint, or a Hugging Face folder"))


def read_model_config(folder: Path) -> EngineModel:
    """The model of `config.json` and `generation_config.json`. Code that they name is never run."""
    config = families.read_config(folder / families.CONFIG_NAME)
    if "auto_map" in config:
        log.warning("%s names code of its own (auto_map); it is not run", folder / families.CONFIG_NAME)
    if settings := families.sampling_settings(folder):
        words = ", ".join(f"{key} {json.dumps(value)[:60]}" for key, value in settings.items())
        log.warning("%s is not followed in: %s; requests say them", folder / families.GENERATION_NAME, words)
    shape = shape_from_hf(config, where=str(folder / families.CONFIG_NAME))
    precision = torch.bfloat16 if precision_of(config) == "bf16" else torch.float32
    return EngineModel(folder, shape, precision, frozenset(families.end_ids(folder, shape)))


def check_split(shape: LlamaShape, ranks: Ranks) -> None:
    """Raises CannotWork if attention heads do not divide over the ranks."""
    for word, count in (("heads", shape.heads), ("kv_heads", shape.kv_heads)):
        if count % ranks.world:
            good = max(n for n in divisors(math.gcd(shape.heads, shape.kv_heads)) if n < ranks.world)
            raise CannotWork(Problem("tp", f"tp={ranks.world} does not divide {word}={count}", f"nearest: tp={good}"))


def _slices(model: EngineModel, ranks: Ranks) -> tuple[Card, Mapping[str, Placement]]:
    """The card, and this rank's slice of every parameter."""
    model_card, layout = card(model.shape, model.shape.longest), Layout(tp=ranks.world)
    return model_card, placements(model_card, layout, coordinates(layout, ranks.rank))


def packed_bytes(model: EngineModel, ranks: Ranks, dtype: torch.dtype) -> int:
    """Memory of this rank's weights while it decodes: tied embeddings have a copy to look up and one to multiply by."""
    model_card, rows = _slices(model, ranks)
    twice = {name for pair in model_card.tied for name in pair}
    return sum(row.box.elements * dtype.itemsize * (2 if name in twice else 1) for name, row in rows.items())


def read_weights(model: EngineModel, ranks: Ranks, dtype: torch.dtype, device: torch.device) -> Mapping[str, Tensor]:
    """This rank's slices by our names, from the placement table; a short last part of a vocabulary is padded."""
    model_card, rows = _slices(model, ranks)
    tensors = {name: (row, torch.empty(row.box.shape, dtype=dtype)) for name, row in rows.items()}
    names, tied = hf_names(model.shape), tied_tensors(model.shape)
    checkpoint.read_model_folder(model.folder, names, tensors, ignored=IGNORED_TENSORS, tied=tied)
    part = -(-model.shape.vocab // ranks.world)
    out = {}
    for parameter in model_card.parameters:
        tensor = tensors[parameter.name][1]
        if parameter.axes[0] == "vocab" and tensor.shape[0] < part:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, part - tensor.shape[0]))
        out[parameter.name] = tensor.to(device)
    return out
