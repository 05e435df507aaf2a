"""`plan --advice`: the strategies and tools that suit a job, planned under each framework that could run it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import CannotWork
from meshwright.verbs.plan import plan, request_of_job, style_of
from meshwright.verbs.start import card_of_job, cluster_of_job, gather, read_job

if TYPE_CHECKING:
    from meshwright.card import Card
    from meshwright.cluster import Cluster
    from meshwright.job import Job
    from meshwright.plan.advice import Advice, DataVolume, FrameworkPlan

#: Of data that nobody has read yet: bytes of text that a token stands for (about as many in English, by a tokenizer of
#: tens of thousands), bytes of a token's number at most, and the digits, images of 8 x 8 numbers.
TEXT_BYTES, TOKEN_BYTES = 4, 4

DIGITS, DIGIT_BYTES = 1797, 256

#: Files of a folder whose sizes are asked for, at most.
FILES_COUNTED = 5_000


def advice(job: Job | str | Path, overrides: Sequence[str] = (), *, experience: str = "some") -> Advice:
    """Strategies and tools that suit the job's model, data, hardware and a team's `experience` (new, some or expert).

    The job is planned under each framework that could run it. Raises CannotWork where none of them has a layout.
    """
    from meshwright.plan.advice import advise, frameworks, situation_of

    sound = read_job(job, overrides, data_must_exist=False, also=plan)
    card, cluster = gather(lambda: card_of_job(sound), lambda: cluster_of_job(sound))
    facts = situation_of(
        card,
        cluster,
        _reading(sound, card),
        built_in=sound.model.module is None,
        experience=experience,
        untrained=_untrained(sound),
        pinned=frozenset(sound.layout.pins()),
    )
    return advise(facts, {row: _planned(sound, card, cluster, row) for row in frameworks(facts)})


def _planned(job: Job, card: Card, cluster: Cluster, framework: str) -> FrameworkPlan | CannotWork:
    """The best layout under a framework, or why there is none. `card` is the job's own."""
    from meshwright.plan import make_plan
    from meshwright.plan.advice import FrameworkPlan

    if job.model.module is None:  # a traced module has one card for all
        card = card_of_job(job, style_of(framework, job.train.precision))
    try:
        chosen = make_plan(card, cluster, request_of_job(job, framework, "time"), what_if=False, suggest=False).chosen
    except CannotWork as error:
        return error
    return FrameworkPlan(framework, chosen.predicted.step_seconds.mid, chosen.layout)


def _untrained(job: Job) -> str:
    """What `train` trains, where the job's model is none of it."""
    from meshwright.families import require_trainable

    try:
        require_trainable(job)
    except CannotWork as error:
        return error.problems[0].nearest
    return ""


def _reading(job: Job, card: Card) -> DataVolume:
    """What a run of the job reads, as far as it is known without reading any of it."""
    from meshwright.plan.advice import DataVolume

    tokens = card.unit == "tokens"
    source, size = job.data.source, None
    per_unit = (1 if job.data.tokenizer == "bytes" else TEXT_BYTES, TOKEN_BYTES) if tokens else (0, 0)
    if source == "digits":
        size, per_unit = DIGITS * DIGIT_BYTES, (DIGIT_BYTES, DIGIT_BYTES)
    elif source == "stdlib":
        from meshwright.data.sources import open_source

        source, size = "Python's standard library", open_source(source, job.data.text_key).fingerprint()["bytes"]
    else:
        path = Path(source)
        source, size = path.name + "/" * path.is_dir(), _bytes_of(path)
    a_step = job.train.global_batch * card.units_per_sample
    return DataVolume(source, card.unit, a_step, job.train.steps, size, *per_unit)


def _bytes_of(path: Path) -> int | None:
    """Bytes of a file, or of all files below a folder; None where there are none, more files than are counted, or some
    that cannot be looked at."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    try:
        few = [path] if path.is_file() else list(islice(files, FILES_COUNTED + 1))
        size = sum(file.stat().st_size for file in few if file.is_file())
    except OSError:
        return None
    return size if size and len(few) <= FILES_COUNTED else None
