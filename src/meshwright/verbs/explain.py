"""`explain`: each value of a job, its origin and its meaning; and the job with every default filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.verbs.start import read_job

if TYPE_CHECKING:
    from meshwright.job import Job


def explain(job: Job | str | Path, overrides: Sequence[str] = (), keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """[{"key", "value", "origin", "meaning"}] for each of `keys` (default: all); a section's name stands for its keys.

    Raises InputError for a bad job or an unknown key.
    """
    from meshwright.job import job_keys

    job = read_job(job, overrides, data_must_exist=False)
    meanings = job_keys()
    sections = {key.partition(".")[0] for key in meanings}
    unknown = [key for key in keys if key not in meanings and key not in sections]
    if unknown:
        names = [*meanings, *sections]
        raise InputError([Problem("command line", f"no key '{key}'", _near_key(key, names)) for key in unknown])
    values, origins = job.as_dict(), job.origins
    rows = []
    for key, meaning in meanings.items():
        section, _, name = key.partition(".")
        if not keys or key in keys or section in keys:
            rows.append({"key": key, "value": values[section][name], "origin": origins[key], "meaning": meaning})
    return rows


def _near_key(key: str, names: Sequence[str]) -> str:
    same_name = [one for one in names if one.partition(".")[2] == key.rpartition(".")[2]]
    if same_name:
        return "did you mean " + " or ".join(f"'{one}'" for one in same_name) + "?"
    phrase = nearest_name(key, names)
    return phrase if phrase.startswith("did you mean") else "`meshwright explain JOB` lists them all"


def resolved_toml(job: Job | str | Path, overrides: Sequence[str] = ()) -> str:
    """The job with every default filled in, as TOML."""
    from meshwright.job import job_to_toml

    return job_to_toml(read_job(job, overrides, data_must_exist=False))
