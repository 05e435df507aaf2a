"""From a job's `[model]` section to what training needs: a meta module, its first values, how it is saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meshwright import families
from meshwright.card import Card
from meshwright.checkpoint import ModelFolder, read_model_folder, saves
from meshwright.errors import InputError, Problem
from meshwright.families.decoder_config import DTYPES
from meshwright.families.llama import card as llama
from meshwright.families.llama.module import build
from meshwright.layout import Box
from meshwright.parallel import ParallelModel
from meshwright.trace import card_of_job, factory_of_job, source_digest

if TYPE_CHECKING:
    from meshwright.job import Job

#: The file of a module of the user's own in a checkpoint's `model/`.
MODULE_NAME = "module.json"
_ELEMENTS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Model:
    """A model before it is split. `fill` sets the first values of a ParallelModel, once: then a custom module's values
    are let go. `folder` says how `model/` is written."""

    card: Card
    module: nn.Module
    fill: Callable[[ParallelModel], None]
    names: Mapping[str, str]
    side_files: Mapping[str, bytes] = field(default_factory=dict)

    def folder(self, more_files: Mapping[str, bytes]) -> ModelFolder:
        return ModelFolder(names=dict(self.names), side_files={**self.side_files, **more_files})


def model_of_job(job: Job, eos_id: int | None) -> Model:
    """The Model of a job. Only a custom module takes memory: one copy on the CPU, until `fill` has been called.

    Raises InputError for a folder or factory that cannot be used.
    """
    if job.model.module:
        return _custom(job)
    shape = families.shape_of_job(job)
    if job.model.hf is None:
        shape = dataclasses.replace(shape, bos_id=eos_id, eos_id=eos_id)
    with torch.device("meta"):
        module = build(shape)
    names = llama.hf_names(shape)

    def fill(model: ParallelModel) -> None:
        model.fill(initial_values(job.train.seed, module.init_rule))
        if job.model.hf:
            tensors = {row.name: (row, model.local(name)) for name, row in model.placements.items()}
            tied = llama.tied_tensors(shape)
            read_model_folder(Path(job.model.hf), names, tensors, ignored=llama.IGNORED_TENSORS, tied=tied)

    side_files = _configs(job, shape, eos_id)
    return Model(llama.card(shape, job.data.seq_len or 1), module, fill, names, side_files)


def _configs(job: Job, shape: llama.LlamaShape, eos_id: int | None) -> dict[str, bytes]:
    """config.json and generation_config.json: those of the job's folder, if it has one, with what training changed.

    The token that ended the documents is among those that end a completion.
    """
    config: dict[str, Any] = {}
    generation: dict[str, Any] = {"bos_token_id": shape.bos_id}
    ends: tuple[int, ...] = ()
    if job.model.hf is not None:
        folder = Path(job.model.hf)
        config = families.read_config(folder / families.CONFIG_NAME)
        if (folder / families.GENERATION_NAME).exists():
            generation |= families.read_config(folder / families.GENERATION_NAME)
        ends = families.end_ids(folder, shape)
    if eos_id is not None and eos_id not in ends:
        ends = (*ends, eos_id)
    for key in ("auto_map", *DTYPES):  # code that is not copied, and how the weights were written before
        config.pop(key, None)
    generation["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0] if ends else None
    contents = {families.CONFIG_NAME: {**config, **llama.hf_config(shape)}, families.GENERATION_NAME: generation}
    return {name: json.dumps(one, indent=2, sort_keys=True).encode() for name, one in contents.items()}


def _custom(job: Job) -> Model:
    factory = factory_of_job(job)
    torch.manual_seed(job.train.seed)
    whole = factory()
    named = [*whole.named_parameters(), *whole.named_buffers(remove_duplicate=False)]
    values = {name: tensor.detach() for name, tensor in named}
    del named
    card = card_of_job(job)
    names = [*(one.name for one in card.parameters), *(one.name for one in card.persistent_buffers)]
    for name in names:
        if not saves(values[name].dtype):
            what = f"{name} is {values[name].dtype}, which safetensors does not have"
            raise InputError(Problem("model.module", what, "use another type, or persistent=False for a buffer"))

    def source(name: str, box: Box) -> Tensor:
        return values.pop(name)[tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))]

    def fill(model: ParallelModel) -> None:
        model.fill(source, values)
        values.clear()

    factory_record = {"factory": job.model.module, "arguments": job.model.arguments, "sha256": source_digest(factory)}
    side_files = {MODULE_NAME: json.dumps(factory_record, indent=2, sort_keys=True).encode()}
    return Model(card, whole.to("meta"), fill, {name: name for name in names}, side_files)


def initial_values(seed: int, rule: Callable[[str], tuple[str, float]]) -> Callable[[str, Box], Tensor]:
    """A source of first values that depend on seed, name and position alone: every layout starts from the same model,
    and a rank draws only the runs of rows that overlap its box.

    Run k of whole rows of parameter `name` has a generator seeded by a digest of (seed, name, k).
    """

    def source(name: str, box: Box) -> Tensor:
        kind, value = rule(name)
        if kind == "constant":
            return torch.full(box.shape, value)
        row = math.prod(box.global_shape[1:])
        rows_at_once = max(1, _ELEMENTS_AT_ONCE // row)
        first, last = box.start[0] // rows_at_once, (box.start[0] + box.shape[0] - 1) // rows_at_once
        runs = []
        for run in range(first, last + 1):
            digest = hashlib.blake2b(f"{seed}\0{name}\0{run}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            rows = min(rows_at_once, box.global_shape[0] - run * rows_at_once)
            runs.append(torch.empty(rows, *box.global_shape[1:]).normal_(0.0, value, generator=generator))
        start = box.start[0] - first * rows_at_once
        inner = tuple(slice(s, s + n) for s, n in zip(box.start[1:], box.shape[1:], strict=True))
        return torch.cat(runs)[(slice(start, start + box.shape[0]), *inner)]

    return source
