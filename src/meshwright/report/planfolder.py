"""A plan as a folder of files: the plan itself, its page, its timeline, and its configuration for other frameworks."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from meshwright.errors import InputError, Problem
from meshwright.plan import Plan
from meshwright.report.exports import EXPORTERS, Recipe, export
from meshwright.report.html import plan_page
from meshwright.report.timeline import MOST_IN_TRACE, chrome_trace, timeline_svg
from meshwright.run import write_atomic

#: Names what was written here, with its digest, so that the next time nothing else is overwritten.
RECORD = "written.json"


def plan_files(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """The text of every file, by name."""
    layout = plan.chosen.layout
    files = {
        "plan.json": f"{plan}\n",
        "plan.html": plan_page(plan),
        "timeline.svg": timeline_svg(plan.chosen),
        "timeline.trace.json": chrome_trace(plan.chosen, layout.devices // layout.pp, MOST_IN_TRACE),
    }
    for name in EXPORTERS:
        files |= export(name, plan, recipe).files
    return files


def write_plan(plan: Plan, recipe: Recipe, folder: str | Path) -> list[Path]:
    """Write `plan_files` into a folder, which is made where it is not there, and return their paths.

    Replaces what an earlier plan wrote there. Raises InputError, before anything is written, where a file of the same
    name is not from here or was changed since.
    """
    root, files = Path(folder), plan_files(plan, recipe)
    try:
        known = _record(root)
        problems = [problem for name in files if (problem := _kept(root / name, known.get(name))) is not None]
        if problems:
            raise InputError(problems)
        root.mkdir(parents=True, exist_ok=True)
        for name in set(known) - set(files):  # of an earlier version, say
            if _kept(root / name, known[name]) is None:
                (root / name).unlink(missing_ok=True)
        written = {name: text.encode() for name, text in files.items()}
        record = {name: sha256(content).hexdigest() for name, content in written.items()}
        write_atomic(root / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        for name, content in written.items():
            write_atomic(root / name, content)
    except OSError as error:
        raise InputError(Problem(str(root), f"cannot be written: {error.strerror}", "name another folder")) from error
    return [root / name for name in files]


def _kept(path: Path, digest: str | None) -> Problem | None:
    """Why a file must be left as it is; None where there is none, or only ours."""
    if not path.exists() and not path.is_symlink():
        return None
    if digest is None:
        return Problem(str(path), "is there, and no plan wrote it", "name another folder, or move it away")
    if path.is_symlink() or not path.is_file() or sha256(path.read_bytes()).hexdigest() != digest:
        return Problem(str(path), "was changed since the plan wrote it", "name another folder, or move it away")
    return None


def _record(root: Path) -> dict[str, str]:
    path = root / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if isinstance(record, dict) and all(_plain(name) and isinstance(value, str) for name, value in record.items()):
        return record
    raise InputError(Problem(str(path), "is not a record of a plan's files", "name another folder"))


def _plain(name: str) -> bool:
    """Whether a name stays in its folder."""
    return Path(name).name == name and name not in ("", ".", "..", RECORD)
