"""`serve`: serve a model until SIGINT, SIGTERM or SIGHUP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from meshwright.verbs.serving import plan_settings


def serving_folder_of(model: str | Path, run: str | Path | None = None) -> Path:
    """The folder `run`, or by default runs/serve-NAME for the model NAME."""
    return Path(run) if run is not None else Path("runs") / f"serve-{str(model).rstrip('/').rpartition('/')[2]}"


def serve(
    model: str | Path,
    overrides: Sequence[str] = (),
    *,
    run: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves a model until SIGINT (Ctrl-C), SIGTERM or SIGHUP. `model` is a run, a checkpoint or a Hugging Face folder,
    or the URL of one in a store. Settings: the [serve] section of a run's folder, then overrides.

    Settings that are left open are planned for this machine; `say` gets a one-line summary of the plan. `run` is a
    folder for logs and for the files by which `status`, `logs` and `stop` find the server. Raises CannotWork for a
    model that does not fit, before weights are read.
    """
    from meshwright.engine.folder import find_model
    from meshwright.job import read_serve
    from meshwright.run import RunFolder
    from meshwright.serve import server
    from meshwright.storage import local_model

    model = local_model(model)
    settings = read_serve(overrides, RunFolder(model).job)
    folder = find_model(model)
    planned = plan_settings(folder, settings)
    say(planned.summary)
    figures = planned.plan.chosen.predicted
    predicted = {"tokens_per_second": figures.tokens_per_second.mid, "token_seconds": figures.tpot_seconds.mid}
    place = None if run is None else RunFolder(run).create()
    with contextlib.nullcontext() if place is None else place.lock():
        where = None if place is None else place.path
        server.main(folder, planned.settings, precision=planned.precision, predicted=predicted, run=where)
