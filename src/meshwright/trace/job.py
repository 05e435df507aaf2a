"""A job's `model.module`, found and traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from meshwright.card import Card
from meshwright.trace.card import card_of
from meshwright.trace.factory import load_factory


def factory_of_job(job: Any) -> Callable[[], nn.Module]:
    """The build function of a job with `model.module`, its arguments bound. Raises InputError as `load_factory`."""
    folders = [job.model.module_folder] if job.model.module_folder else []
    return load_factory(job.model.module, job.model.arguments, folders)


def card_of_job(job: Any) -> Card:
    """The Card of a job with `model.module`. A language model is traced on `data.seq_len` tokens, any other model on
    its own `sample_input()`."""
    factory = factory_of_job(job)
    if job.task.name != "language-model":
        return card_of(factory, None, job.model.module)
    tokens = torch.zeros(1, job.data.seq_len or 1, dtype=torch.int64)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    sample = (tokens, {"positions": positions})
    return card_of(factory, sample, job.model.module, unit="tokens", units_per_sample=tokens.shape[1])
