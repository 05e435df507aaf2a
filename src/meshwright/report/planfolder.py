"""A plan as a folder of files: the plan itself, its page, its timeline, and its configuration for other frameworks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from meshwright.errors import InputError, Problem
from meshwright.files import write_atomic
from meshwright.plan import Plan
from meshwright.report.exports import EXPORTERS, export
from meshwright.report.html import plan_page
from meshwright.report.timeline import MOST_IN_TRACE, chrome_trace, timeline_svg
from meshwright.report.training_words import Recipe

#: Names what was written here, with its digest (or digests: what was there, and what was about to be), so that the next
#: time nothing else is overwritten.
RECORD = "written.json"
DRAFTS = ".plan-"


def plan_files(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """The text of every file, by name. Other frameworks cannot express a batch that groups of devices share
    unevenly: such a plan has no configuration for them."""
    layout = plan.chosen.layout
    files = {
        "plan.json": f"{plan}\n",
        "plan.html": plan_page(plan),
        "timeline.svg": timeline_svg(plan.chosen),
        "timeline.trace.json": chrome_trace(plan.chosen, layout.devices // layout.pp, MOST_IN_TRACE),
    }
    for name in () if plan.has_batch_shares else EXPORTERS:
        files |= export(name, plan, recipe).files
    return files


def write_plan(plan: Plan, recipe: Recipe, folder: str | Path) -> list[Path]:
    """Write `plan_files` into a folder, which is made where it is not there, and return their paths.

    Replaces what an earlier plan wrote there: all of it, or nothing where the files cannot be written. Raises
    InputError, before anything is replaced, where a file of the same name is not from here or was changed since.
    """
    if str(folder) == "":
        raise InputError(Problem("command line: --write", "names no folder", "name one; '.' is this one"))
    root, files = Path(folder), plan_files(plan, recipe)
    try:
        if root.is_dir():
            with _locked(root):
                return _replace_all(root, files)
        _check_conflicts(root, files, _record(root))
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            return _replace_all(root, files)
    except OSError as error:
        raise InputError(Problem(str(root), f"cannot be written: {error.strerror}", "name another folder")) from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the lock of the folder, which one plan at a time writes into."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace_all(root: Path, files: Mapping[str, str]) -> list[Path]:
    """Writes all files beside the old ones, then puts them in their places. Whatever stops that, the record knows both,
    and the next plan removes what was left beside them."""
    for left in (*root.glob(f"{DRAFTS}*"), *root.glob(f".{RECORD}.*.tmp")):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    known = _record(root)
    _check_conflicts(root, files, known)
    new = {name: sha256(text.encode()).hexdigest() for name, text in files.items()}
    with tempfile.TemporaryDirectory(prefix=DRAFTS, dir=root) as drafts:
        for name, text in files.items():
            (Path(drafts) / name).write_bytes(text.encode())
        _save(root, {**known, **{name: [*known.get(name, []), digest] for name, digest in new.items()}})
        for name in files:
            os.replace(Path(drafts) / name, root / name)
    for name in set(known) - set(files):  # of an earlier version, say
        if _conflict(root / name, known[name]) is None:
            (root / name).unlink(missing_ok=True)
    _save(root, {name: [digest] for name, digest in new.items()})
    return [root / name for name in files]


def _check_conflicts(root: Path, files: Mapping[str, str], known: Mapping[str, list[str]]) -> None:
    problems = [problem for name in files if (problem := _conflict(root / name, known.get(name))) is not None]
    if problems:
        raise InputError(problems)


def _save(root: Path, record: Mapping[str, list[str]]) -> None:
    write_atomic(root / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _conflict(path: Path, digests: list[str] | None) -> Problem | None:
    """Why a file must be left as it is; None where it does not exist, or is an earlier plan's."""
    if not path.exists() and not path.is_symlink():
        return None
    if digests is None:
        return Problem(str(path), "exists, and no plan wrote it", "name another folder, or move it away")
    if path.is_symlink() or not path.is_file() or sha256(path.read_bytes()).hexdigest() not in digests:
        return Problem(str(path), "was changed since the plan wrote it", "name another folder, or move it away")
    return None


def _record(root: Path) -> dict[str, list[str]]:
    path = root / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        digests = {name: [value] if isinstance(value, str) else value for name, value in record.items()}
        lists = all(isinstance(value, list) and all(isinstance(d, str) for d in value) for value in digests.values())
        if lists and all(_stays_in_folder(name) for name in digests):
            return digests
    raise InputError(Problem(str(path), "is not a record of a plan's files", "name another folder"))


def _stays_in_folder(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..", RECORD)
