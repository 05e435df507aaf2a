"""`report`: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path

from meshwright.errors import InputError, Problem


def report(run: str | Path) -> Path:
    """Writes the self-contained HTML page of a run and returns its path.

    Raises InputError where there is no run, and where the newest checkpoint is damaged, whose every byte is read first:
    the page is of a run that can go on.
    """
    from meshwright.run import RunFolder

    folder = RunFolder(run)
    for file in (folder.job, folder.plan):
        if not file.is_file():
            what = f"is not a run folder: it has no {file.name}"
            raise InputError(Problem(str(folder.path), what, "name the folder that `train` made"))
    if folder.checkpoints.is_dir():
        _check_newest(folder.checkpoints)
    return write_page(folder.path)


def _check_newest(checkpoints: Path) -> None:
    from meshwright import checkpoint

    while (newest := checkpoint.latest(checkpoints)) is not None:
        try:
            return checkpoint.check(newest)
        except InputError:
            if newest.exists():  # otherwise the run, which goes on, removed it for a newer one
                raise


def write_page(run: Path) -> Path:
    """Writes the page of a run without a look at its checkpoints; returns its path."""
    from meshwright.report import html
    from meshwright.run import RunFolder

    html.write_report(run)
    return RunFolder(run).report
