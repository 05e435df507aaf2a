"""Any `nn.Module` -> Card: `load_factory` imports the user's build function, `card_of` traces one forward pass.

`factory_of_job` and `card_of_job` do this for a job with `model.module`; `source_digest` is of the function's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from meshwright.card import Card
from meshwright.trace.card import SampleInputs, card_of
from meshwright.trace.factory import load_factory, source_digest

if TYPE_CHECKING:
    from meshwright.job import Job

__all__ = ["card_of", "card_of_job", "factory_of_job", "load_factory", "source_digest"]


def factory_of_job(job: Job) -> Callable[[], nn.Module]:
    """The build function of a job with `model.module`. Raises InputError as `load_factory` does."""
    assert job.model.module is not None
    folders = [] if job.model.module_folder is None else [job.model.module_folder]
    return load_factory(job.model.module, job.model.arguments, folders)


def card_of_job(job: Job, sample_inputs: SampleInputs | None = None) -> Card:
    """The Card of a job with `model.module`. Without `sample_inputs` the module must have a `sample_input()`.

    Raises InputError as `load_factory` and `card_of` do.
    """
    name = job.model.module or ""
    if job.task.name == "language-model":
        return card_of(factory_of_job(job), sample_inputs, name, unit="tokens", units_per_sample=job.data.seq_len or 1)
    return card_of(factory_of_job(job), sample_inputs, name)
