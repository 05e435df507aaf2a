"""The errors, as one small tree.

    MeshwrightError            exit  raised when
    ├── InputError               2   a file, key, argument or request is wrong; lists every problem
    ├── CannotWork               3   the request is well-formed but does not fit, or no layout can do it
    ├── RunFailed                4   a process failed while working; carries the command that resumes
    └── LayoutsDisagree          5   `verify` found that a layout computes something else than one device

Every message says what is wrong, where (file and key, or rank and step), and the nearest thing that works.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """`what` is wrong, at `where` (file and key, or rank and step); `nearest` is the closest that works."""

    where: str
    what: str
    nearest: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.nearest}" if self.nearest else text


class MeshwrightError(Exception):
    """Root of the tree. `exit_code` is that of the command line; `problems` is never empty."""

    exit_code = 4

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class InputError(MeshwrightError):
    """Bad input: a file, a key, an argument or a request."""

    exit_code = 2


class CannotWork(MeshwrightError):
    """Well-formed, but does not fit or cannot be done; `nearest` of each problem names what can."""

    exit_code = 3


class RunFailed(MeshwrightError):
    """A process failed at run time; `resume` is the command that continues from the last checkpoint ("" if none)."""

    exit_code = 4

    def __init__(self, problems: Problem | str | Iterable[Problem], resume: str = "") -> None:
        super().__init__(problems)
        self.resume = resume


class LayoutsDisagree(MeshwrightError):
    """A layout differs from one device; the problem names the first step and tensor."""

    exit_code = 5


#: What the system refuses -> (the error, what helps). Any other refusal that names a file is an InputError.
REFUSALS: dict[int, tuple[type[MeshwrightError], str]] = {
    errno.ENOSPC: (RunFailed, "free space on that disk, or name a folder on another"),
    errno.EDQUOT: (RunFailed, "free some of your quota, or name a folder on another disk"),
    errno.EFBIG: (RunFailed, "raise the limit on the size of a file (ulimit -f), or name a folder on another disk"),
    errno.EIO: (RunFailed, "check that disk, or name a folder on another"),
    errno.EMFILE: (RunFailed, "raise the limit on open files (ulimit -n)"),
    errno.ENOMEM: (RunFailed, "free memory, or take a smaller model or batch"),
    errno.EAGAIN: (RunFailed, "raise the limit on processes and threads (ulimit -u)"),
    errno.EROFS: (InputError, "name a folder that can be written, or copy this one to such a place"),
    errno.EACCES: (InputError, "name one that you may use, or change its permissions"),
    errno.EPERM: (InputError, "name one that you may use, or change its permissions"),
    errno.ENAMETOOLONG: (InputError, "give it a shorter name"),
    errno.ENOENT: (InputError, "name one that exists"),
}


def refused_by_system(error: OSError) -> MeshwrightError | None:
    """A system's refusal (a full disk, a folder that is read-only) as a named problem; None where it names nothing."""
    if error.filename is None and error.errno not in REFUSALS:
        return None
    kind, nearest = REFUSALS.get(error.errno or 0, (InputError, ""))
    where = "" if error.filename is None else str(error.filename)
    return kind(Problem(where, error.strerror or str(error), nearest))


def nearest_name(name: str, names: Sequence[str]) -> str:
    """A hint for an unknown name: "did you mean 'lr'?" or "known: a, b, c"."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(sorted(names))
