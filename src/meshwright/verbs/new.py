"""`new`: a small job to start from, and the JSON Schema of job files."""

from __future__ import annotations

import json


def new(*, schema: bool = False) -> str:
    """The text of a small commented job; with `schema`, the JSON Schema of job files."""
    from meshwright.job import SMALL_JOB, json_schema

    return json.dumps(json_schema(), indent=2) + "\n" if schema else SMALL_JOB
