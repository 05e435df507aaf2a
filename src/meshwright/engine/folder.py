"""From a folder to a decoder's weights: which folder is meant, what model it says it is, this rank's slices of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright import checkpoint
from meshwright.checkpoint.files import parse_json, read_capped
from meshwright.engine.ranks import Ranks
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.families.llama.card import LlamaShape, hf_names, parameters, shape_from_hf
from meshwright.layout import AXIS_RULES, Box, Piece

log = logging.getLogger("meshwright")

_CONFIG_CAP_BYTES = 16 << 20
#: Tensors that some writers add: frequencies that are computed, and the alias of tied embeddings.
_COMPUTED = ("*.rotary_emb.inv_freq",)
_TIED_ALIAS = "lm_head.weight"


@dataclass(frozen=True)
class EngineModel:
    """A Hugging Face folder as the engine reads it. `precision` is the element type that its config names."""

    folder: Path
    shape: LlamaShape
    precision: torch.dtype
    eos_ids: frozenset[int]

    @property
    def longest(self) -> int:
        """Tokens a sequence may have: the model's positions, or its sliding window where that is shorter.

        Inside its window a model with sliding-window attention is an ordinary one; past it the engine does not go.
        """
        window = self.shape.sliding_window
        return min(self.shape.max_positions, window) if window else self.shape.max_positions


def find_model(folder: Path) -> Path:
    """The Hugging Face folder meant by `folder`: itself, a checkpoint's `model/`, or a run's newest checkpoint's.

    Raises InputError where there is none.
    """
    if (folder / "config.json").exists():
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
        raise InputError(
            Problem(
                str(folder), "holds a module of yours; the engine decodes the built-in families", 'family = "llama"'
            )
        )
    what = "holds no model: no config.json" if folder.is_dir() else "is not a folder"
    raise InputError(Problem(str(folder), what, "name a run, a checkpoint, or a Hugging Face folder"))


def read_config(folder: Path) -> EngineModel:
    """What `config.json` and `generation_config.json` say. Only data is read: code that they name is never run."""
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        log.warning("%s names code of its own (auto_map); it is not run", folder / "config.json")
    shape = shape_from_hf(config, where=str(folder / "config.json"))
    eos: Any = shape.eos_id
    if (folder / "generation_config.json").exists():
        eos = _read_json(folder / "generation_config.json").get("eos_token_id", eos)
    ids = eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    if any(type(id) is not int for id in ids):
        raise InputError(Problem(str(folder), f"eos_token_id is {eos!r}", "a token id or a list of them"))
    word = config.get("dtype") or config.get("torch_dtype")
    precision = torch.bfloat16 if word == "bfloat16" else torch.float32
    return EngineModel(folder, shape, precision, frozenset(ids))


def _read_json(path: Path) -> dict[str, Any]:
    record = parse_json(read_capped(path, _CONFIG_CAP_BYTES, follow_links=True), str(path))
    if not isinstance(record, dict):
        raise InputError(Problem(str(path), "is not a JSON object"))
    return record


def check_split(shape: LlamaShape, ranks: Ranks) -> None:
    """Raises CannotWork where attention heads do not divide over the ranks."""
    for word, count in (("heads", shape.heads), ("kv_heads", shape.kv_heads)):
        if count % ranks.world:
            good = [n for n in range(1, ranks.world) if shape.heads % n == 0 and shape.kv_heads % n == 0]
            raise CannotWork(
                Problem("tp", f"{word} {count} does not divide by tp {ranks.world}", f"tp {good[-1]} does")
            )


def read_weights(model: EngineModel, ranks: Ranks, dtype: torch.dtype, device: torch.device) -> Mapping[str, Tensor]:
    """This rank's slices by our names, cut as `layout.AXIS_RULES` says; a short last part of a vocabulary is padded."""
    wanted: dict[str, tuple[Piece, Tensor]] = {}
    for parameter in parameters(model.shape):
        box = Box.whole(parameter.shape)
        for dim, axis in enumerate(parameter.axes):
            if axis is not None and AXIS_RULES[axis] == "tp":
                box = box.split(dim, ranks.world, ranks.rank)
        piece = Piece(parameter.name, box, replicas=1, owner=True)
        wanted[parameter.name] = (piece, torch.empty(box.shape, dtype=dtype))
    ignored = (*_COMPUTED, _TIED_ALIAS) if model.shape.tied else _COMPUTED
    checkpoint.read_model_folder(model.folder, hf_names(model.shape), wanted, ignored=ignored)
    rows = -(-model.shape.vocab // ranks.world)
    out = {}
    for name, (_, tensor) in wanted.items():
        if name in ("blocks.embed.weight", "blocks.head.out.weight") and tensor.shape[0] < rows:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
        out[name] = tensor.to(device)
    return out
