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
from meshwright.report.exports import EXPORTERS
from meshwright.report.html import plan_page
from meshwright.report.timeline import MOST_IN_TRACE, chrome_trace, timeline_svg
from meshwright.report.training_words import Recipe

#: File name -> digests of what plans wrote under it (two while a write is under way), so that no other file is ever
#: overwritten.
RECORD = "written.json"
DRAFTS = ".plan-"


def plan_files(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """The text of every file, by name. A batch that groups of devices share unevenly has no configuration for other
    frameworks, which cannot express it."""
    layout = plan.chosen.layout
    files = {
        "plan.json": f"{plan}\n",
        "plan.html": plan_page(plan),
        "timeline.svg": timeline_svg(plan.chosen),
        "timeline.trace.json": chrome_trace(plan.chosen, layout.devices // layout.pp, MOST_IN_TRACE),
    }
    for exporter in () if plan.has_batch_shares else EXPORTERS.values():
        files |= exporter(plan, recipe).files
    return files


def write_plan(plan: Plan, recipe: Recipe, folder: str | Path) -> list[Path]:
    """Write `plan_files` into a folder, which is created if need be, and return their paths.

    Replaces all files of an earlier plan there, or none if a write fails. Raises InputError, before anything is
    replaced, where a file of the same name was not written by a plan or was changed since.
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
    """Hold the lock of the folder: one plan writes at a time."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace_all(root: Path, files: Mapping[str, str]) -> list[Path]:
    """Write all files as drafts, then move them into place. If that is interrupted, the record has the digests of the
    old and the new files, and the next plan removes the drafts."""
    for draft in (*root.glob(f"{DRAFTS}*"), *root.glob(f".{RECORD}.*.tmp")):
        shutil.rmtree(draft) if draft.is_dir() and not draft.is_symlink() else draft.unlink()
    old = _record(root)
    _check_conflicts(root, files, old)
    new = {name: sha256(text.encode()).hexdigest() for name, text in files.items()}
    with tempfile.TemporaryDirectory(prefix=DRAFTS, dir=root) as drafts:
        for name, text in files.items():
            (Path(drafts) / name).write_bytes(text.encode())
        _save(root, {**old, **{name: [*old.get(name, []), digest] for name, digest in new.items()}})
        for name in files:
            os.replace(Path(drafts) / name, root / name)
    for name in set(old) - set(files):  # written by an earlier version, for example
        if _conflict(root / name, old[name]) is None:
            (root / name).unlink(missing_ok=True)
    _save(root, {name: [digest] for name, digest in new.items()})
    return [root / name for name in files]


def _check_conflicts(root: Path, files: Mapping[str, str], record: Mapping[str, list[str]]) -> None:
    problems = [problem for name in files if (problem := _conflict(root / name, record.get(name))) is not None]
    if problems:
        raise InputError(problems)


def _save(root: Path, record: Mapping[str, list[str]]) -> None:
    write_atomic(root / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _conflict(path: Path, digests: list[str] | None) -> Problem | None:
    """Why a file must not be replaced; None where it does not exist or an earlier plan wrote it."""
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
