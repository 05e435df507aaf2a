"""CPU constants fitted to measured runs of `bench.runs`, and the error of the fit on a model that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from bench.runs.models import MODELS
from bench.runs.predicted import MeasuredRun, card_of, estimate, median_seconds, table
from meshwright.plan.calibrate.fit import Prior, fit
from meshwright.plan.calibrate.from_cases import weighted_quantile
from meshwright.plan.constants import Profile, default_profile
from meshwright.plan.constants.cpu import CPU_CONSTANTS
from meshwright.plan.constants.profile import DEFAULT_FILE

#: Intervals are for 90 %, and wider than the measured ones by a factor: four models are few (the demo is a fifth).
TAILS, WIDER = (0.05, 0.95), 1.2


def unfitted() -> Profile:
    """The shipped profile with the CPU constants of microbenchmarks."""
    return default_profile().changed({one.name: one.value for one in CPU_CONSTANTS})


def fitted(measured: Mapping[str, list[MeasuredRun]], without: str = "") -> Profile:
    """CPU constants fitted to the runs of every model but `without`."""
    import numpy as np

    rows = [(model, run) for model, runs in measured.items() if model != without for run in runs]
    cards = {model: card_of(model) for model in measured}
    start = unfitted()

    def logs(values: Mapping[str, float], which: Any) -> Any:
        profile = start.changed(values)
        chosen = [rows[index] for index in which]
        return np.log([estimate(cards[m], one, MODELS[m][2], profile).step_seconds for m, one in chosen])

    priors = [Prior(one.name, start[one.name], one.prior) for one in CPU_CONSTANTS if one.prior > 0]
    seconds = np.log([median_seconds(one) for _, one in rows])
    result = fit(logs, seconds, np.ones(len(rows)), priors)
    return start.changed(result.values, "without " + without if without else "fitted")


def held_out(measured: Mapping[str, list[MeasuredRun]]) -> tuple[str, list[float]]:
    """`table`, with each model predicted by constants fitted to the others."""
    profiles = {model: fitted(measured, without=model) for model in measured}
    return table(measured, profiles, "Each model by constants fitted to the other models' runs")


def write_default(measured: Mapping[str, list[MeasuredRun]]) -> None:
    """Writes the shipped profile with CPU constants fitted to all runs, and intervals from the held-out models."""
    _, logs = held_out(measured)
    best = fitted(measured)
    start = default_profile().changed({one.name: best[one.name] for one in CPU_CONSTANTS})
    comment = (
        f"# cpu.*: written by `python -m bench.runs --write-default` from {len(logs)} runs on two cores of an EPYC."
    )
    _save(replace(start, intervals={**start.intervals, **_intervals(measured, logs)}), comment, "# cpu.")


def write_intervals(measured: Mapping[str, list[MeasuredRun]]) -> None:
    """Writes the shipped profile with the same CPU constants, and intervals widened to hold the runs on this machine,
    which should not be the one of the fit."""
    start = default_profile()
    _, logs = table(measured, dict.fromkeys(measured, start), "")
    comment = f"# cpu intervals: `python -m bench.runs --write-intervals`, {len(logs)} runs on a machine not fitted."
    intervals = _intervals(measured, logs)
    (low, high), (least, most) = intervals["cpu"], start.interval("cpu")
    intervals = {**start.intervals, **intervals, "cpu": (min(low, least), max(high, most))}
    _save(replace(start, intervals=intervals), comment, "# cpu intervals")


def _intervals(measured: Mapping[str, list[MeasuredRun]], logs: list[float]) -> dict[str, tuple[float, float]]:
    """The intervals of a run, and of the ratio of two layouts of a model in one precision."""
    import numpy as np

    low, high = (math.exp(float(x)) for x in np.quantile(logs, TAILS))
    remaining, weighted = iter(logs), []
    for runs in measured.values():
        of_model = [(run["precision"], log) for run, log in zip(runs, remaining, strict=False)]
        distances = [abs(a - b) for (p, a), (q, b) in combinations(of_model, 2) if p == q]
        weighted += [(distance, 1 / len(distances)) for distance in distances]
    ratio = math.exp(weighted_quantile(weighted, TAILS[1] - TAILS[0]))
    return {"cpu": (min(low / WIDER, 1.0), max(high * WIDER, 1.0)), "pairs.cpu": (1 / ratio, ratio)}


def _save(profile: Profile, comment: str, prefix: str) -> None:
    """Writes the shipped profile. In its head `comment` replaces the lines that begin with `prefix`."""
    head = [line for line in DEFAULT_FILE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [*(line for line in head if not line.startswith(prefix)), comment]
    profile.save(DEFAULT_FILE)
    DEFAULT_FILE.write_text("\n".join(lines) + "\n" + DEFAULT_FILE.read_text(encoding="utf-8"), encoding="utf-8")
