"""`report`: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path

from meshwright.errors import InputError, Problem


def report(run: str | Path) -> Path:
    """Writes the self-contained HTML page of a run and returns its path. Raises InputError where there is no run."""
    from meshwright.report import html
    from meshwright.run import RunFolder

    folder = RunFolder(run)
    for file in (folder.job, folder.plan):
        if not file.is_file():
            what = f"is not a run folder: it has no {file.name}"
            raise InputError(Problem(str(folder.path), what, "name the folder that `train` made"))
    html.write_report(folder.path)
    return folder.report
