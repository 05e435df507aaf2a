"""`predict`: step time and memory of each case in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshwright.verbs.plan import profile_of


def predict(
    cases: str | Path, *, profile: str | Path | None = None, datasheet: bool = False
) -> Iterator[dict[str, Any]]:
    """One result per line of a file of cases, in order: {id, step_seconds, peak_allocated_gib, peak_reserved_gib,
    breakdown} or {id, error}. Raises InputError where the file or the profile cannot be read."""
    from meshwright.plan.cases import predictions, read_cases

    return predictions(read_cases(cases), profile_of(profile, datasheet=datasheet))
