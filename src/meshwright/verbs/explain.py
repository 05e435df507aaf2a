"""`explain`: what each value of a job is and where it came from; the job with everything filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.verbs.start import read_job

if TYPE_CHECKING:
    from meshwright.job import Job


def explain(job: Job | str | Path, overrides: Sequence[str] = (), keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What each value is and where it came from: [{"key", "value", "origin", "meaning"}].

    All keys unless `keys` names some; a section's name stands for all of its keys. Raises InputError for a bad job or
    an unknown key.
    """
    from meshwright.job import job_keys

    job = read_job(job, overrides, data_must_exist=False)
    meanings = job_keys()
    sections = {key.partition(".")[0] for key in meanings}
    unknown = [key for key in keys if key not in meanings and key not in sections]
    if unknown:
        known = [*meanings, *sections]
        raise InputError([Problem("command line", f"no key '{key}'", _near_key(key, known)) for key in unknown])
    values, origins = job.as_dict(), job.origins
    rows = []
    for key, meaning in meanings.items():
        section, _, name = key.partition(".")
        if not keys or key in keys or section in keys:
            row = {"key": key, "value": values[section][name], "origin": origins[key], "meaning": meaning}
            rows.append(row)
    return rows


def _near_key(key: str, known: Sequence[str]) -> str:
    same = [one for one in known if one.partition(".")[2] == key.rpartition(".")[2]]
    if same:
        return "did you mean " + " or ".join(f"'{one}'" for one in same) + "?"
    phrase = nearest_name(key, known)
    return phrase if phrase.startswith("did you mean") else "`meshwright explain JOB` lists them all"


def resolved(job: Job | str | Path, overrides: Sequence[str] = ()) -> str:
    """The job with everything filled in, as TOML."""
    from meshwright.job import job_to_toml

    return job_to_toml(read_job(job, overrides, data_must_exist=False))
