"""What passes between a process and those it starts: who a worker is, and an error as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import CannotWork, InputError, LayoutsDisagree, MeshwrightError, Problem, RunFailed

#: Errors that come back from a worker as the class they were raised as. Any other comes back as RunFailed.
ERRORS: dict[str, type[MeshwrightError]] = {
    error.__name__: error for error in (MeshwrightError, InputError, CannotWork, RunFailed, LayoutsDisagree)
}


@dataclass(frozen=True)
class Context:
    """Who this process is. `store_path` is where torch's FileStore of the job goes, in a folder only its user reads."""

    rank: int
    world: int
    store_path: Path


def error_to_dict(error: MeshwrightError) -> dict[str, Any]:
    """The JSON form of an error of our tree."""
    kind = next(name for name in (base.__name__ for base in type(error).__mro__) if name in ERRORS)
    problems = [[problem.where, problem.what, problem.nearest] for problem in error.problems]
    return {"kind": kind, "problems": problems, "resume": error.resume if isinstance(error, RunFailed) else ""}


def error_from_dict(error: dict[str, Any]) -> MeshwrightError:
    """The error that `error_to_dict` wrote down, of the same class."""
    problems = [Problem(*texts) for texts in error["problems"]]
    if error["kind"] == "RunFailed":
        return RunFailed(problems, resume=error["resume"])
    return ERRORS[error["kind"]](problems)
