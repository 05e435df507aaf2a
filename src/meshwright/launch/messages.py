"""What a process and its workers exchange: the context of a worker, and errors as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import CannotWork, InputError, LayoutsDisagree, MeshwrightError, Problem, RunFailed

#: Errors of a worker that keep their class in the parent. Any other becomes RunFailed.
ERRORS: dict[str, type[MeshwrightError]] = {
    error.__name__: error for error in (MeshwrightError, InputError, CannotWork, RunFailed, LayoutsDisagree)
}


@dataclass(frozen=True)
class Context:
    """A worker's place among the processes. `store_path` is for torch's FileStore, in a folder only the user reads."""

    rank: int
    world: int
    store_path: Path


def error_to_dict(error: MeshwrightError) -> dict[str, Any]:
    """An error as JSON, under the nearest class of ERRORS."""
    kind = next(name for name in (base.__name__ for base in type(error).__mro__) if name in ERRORS)
    problems = [[problem.where, problem.what, problem.nearest] for problem in error.problems]
    return {"kind": kind, "problems": problems, "resume": error.resume if isinstance(error, RunFailed) else ""}


def error_from_dict(error: dict[str, Any]) -> MeshwrightError:
    """The inverse of `error_to_dict`."""
    problems = [Problem(*texts) for texts in error["problems"]]
    if error["kind"] == "RunFailed":
        return RunFailed(problems, resume=error["resume"])
    return ERRORS[error["kind"]](problems)
