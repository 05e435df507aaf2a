"""What one job file says, in any of its forms: TOML, overrides, Python. Reads it, fills it in, lists what is wrong."""

from meshwright.job.job import (
    SMALL_JOB,
    Job,
    job_keys,
    job_to_toml,
    json_schema,
    load_job,
    read_serve,
    sections_to_toml,
    valid_part,
)

__all__ = [
    "SMALL_JOB",
    "Job",
    "job_keys",
    "job_to_toml",
    "json_schema",
    "load_job",
    "read_serve",
    "sections_to_toml",
    "valid_part",
]
