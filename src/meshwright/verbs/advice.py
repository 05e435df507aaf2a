"""`plan --advice`: the strategies and tools that suit a job, from its plan under each framework that could run it."""

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

#: Bytes of text per token (about 4 in English, with a vocabulary of tens of thousands), and of a token id at most.
TEXT_BYTES, TOKEN_BYTES = 4, 4
#: Images of scikit-learn's digits, and bytes of each: 8 x 8 numbers.
DIGITS, DIGIT_BYTES = 1797, 256
#: A folder with more files is not measured.
MOST_FILES = 5_000


def advice(job: Job | str | Path, overrides: Sequence[str] = (), *, experience: str = "some") -> Advice:
    """Strategies and tools that suit the job's model, data, hardware and a team's `experience` (new, some or expert).

    Raises CannotWork where no framework has a layout for the job.
    """
    from meshwright.plan.advice import advise, frameworks, situation_of

    valid_job = read_job(job, overrides, data_must_exist=False, further_check=plan)
    card, cluster = gather(lambda: card_of_job(valid_job), lambda: cluster_of_job(valid_job))
    facts = situation_of(
        card,
        cluster,
        _reading(valid_job, card),
        built_in=valid_job.model.module is None,
        experience=experience,
        untrained=_untrained(valid_job),
        pinned=frozenset(valid_job.layout.pins()),
    )
    return advise(facts, {row: _planned(valid_job, card, cluster, row) for row in frameworks(facts)})


def _planned(job: Job, card: Card, cluster: Cluster, framework: str) -> FrameworkPlan | CannotWork:
    """The best layout under a framework, or why there is none. `card` is that of our own code."""
    from meshwright.plan import make_plan
    from meshwright.plan.advice import FrameworkPlan

    if job.model.module is None:  # a module's card is the same under every framework
        card = card_of_job(job, style_of(framework, job.train.precision))
    try:
        chosen = make_plan(card, cluster, request_of_job(job, framework, "time"), what_if=False, suggest=False).chosen
    except CannotWork as error:
        return error
    return FrameworkPlan(framework, chosen.predicted.step_seconds.mid, chosen.layout)


def _untrained(job: Job) -> str:
    """What `train` can train, where it cannot train the job's model; "" where it can."""
    from meshwright.families import require_trainable

    try:
        require_trainable(job)
    except CannotWork as error:
        return error.problems[0].nearest
    return ""


def _reading(job: Job, card: Card) -> DataVolume:
    """What a run of the job reads, as far as it is known without reading data."""
    from meshwright.plan.advice import DataVolume

    tokens = card.unit == "tokens"
    source, size = job.data.source, None
    per_unit = (1 if job.data.tokenizer == "bytes" else TEXT_BYTES, TOKEN_BYTES) if tokens else (0, 0)
    if source == "digits":
        size, per_unit = DIGITS * DIGIT_BYTES, (DIGIT_BYTES, DIGIT_BYTES)
    elif source == "stdlib":
        from meshwright.data.sources import open_source

        source, size = "Python's standard library", open_source(source, job.data.text_key).total_bytes()
    else:
        path = Path(source)
        source, size = path.name + "/" * path.is_dir(), _bytes_of(path)
    units_per_step = job.train.global_batch * card.units_per_sample
    return DataVolume(source, card.unit, units_per_step, job.train.steps, size, *per_unit)


def _bytes_of(path: Path) -> int | None:
    """Bytes of a file, or of all files below a folder; None where they are empty, unreadable, or more than
    MOST_FILES."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    try:
        counted = [path] if path.is_file() else list(islice(files, MOST_FILES + 1))
        size = sum(file.stat().st_size for file in counted if file.is_file())
    except OSError:
        return None
    return size if size and len(counted) <= MOST_FILES else None
