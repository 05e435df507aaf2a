"""The CPU constants fitted to measured runs of `bench.runs`, and what such a fit is worth on a model it did not see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from bench.runs.models import MODELS
from bench.runs.predicted import Measured, card_of, estimate, median_seconds, table
from meshwright.plan.calibrate.fit import Prior, fit
from meshwright.plan.calibrate.from_cases import weighted_quantile
from meshwright.plan.constants import Profile, default_profile
from meshwright.plan.constants.cpu import CPU_CONSTANTS
from meshwright.plan.constants.profile import DEFAULT_FILE

#: Intervals are stated for 90 %, and kept wider than what was found: four models are few (the demo's is a fifth).
TAILS, WIDER = (0.05, 0.95), 1.2


def unfitted() -> Profile:
    """The shipped profile with its CPU constants as microbenchmarks gave them."""
    return default_profile().changed({one.name: one.value for one in CPU_CONSTANTS})


def fitted(measured: Mapping[str, list[Measured]], without: str = "") -> Profile:
    """CPU constants that fit the runs of every model but `without`."""
    import numpy as np

    rows = [(model, one) for model, found in measured.items() if model != without for one in found]
    cards = {model: card_of(model) for model in measured}
    start = unfitted()

    def logs(values: Mapping[str, float], which: Any) -> Any:
        profile = start.changed(values)
        chosen = [rows[index] for index in which]
        return np.log([estimate(cards[m], one, MODELS[m][2], profile).step_seconds for m, one in chosen])

    priors = [Prior(one.name, start[one.name], one.prior) for one in CPU_CONSTANTS if one.prior > 0]
    seconds = np.log([median_seconds(one) for _, one in rows])
    found = fit(logs, seconds, np.ones(len(rows)), priors)
    return start.changed(found.values, "without " + without if without else "fitted")


def held_out(measured: Mapping[str, list[Measured]]) -> tuple[str, list[float]]:
    """`table`, each model predicted by constants fitted to the others."""
    profiles = {model: fitted(measured, without=model) for model in measured}
    return table(measured, profiles, "Each model by constants fitted to the other models' runs")


def write_default(measured: Mapping[str, list[Measured]]) -> None:
    """The shipped profile with CPU constants fitted to all the runs, and the intervals that models held out ask for."""
    _, logs = held_out(measured)
    best = fitted(measured)
    start = default_profile().changed({one.name: best[one.name] for one in CPU_CONSTANTS})
    said = f"# cpu.*: written by `python -m bench.runs --write-default` from {len(logs)} runs on two cores of an EPYC."
    _save(replace(start, intervals={**start.intervals, **_intervals(measured, logs)}), said, "# cpu.")


def write_intervals(measured: Mapping[str, list[Measured]]) -> None:
    """The shipped profile with its CPU constants as they are and its intervals widened by what runs on this machine ask
    for, where it is not the one that they were fitted on."""
    start = default_profile()
    _, logs = table(measured, dict.fromkeys(measured, start), "")
    said = f"# cpu intervals: `python -m bench.runs --write-intervals`, {len(logs)} runs on a machine not fitted."
    found = _intervals(measured, logs)
    (low, high), (least, most) = found["cpu"], start.interval("cpu")
    intervals = {**start.intervals, **found, "cpu": (min(low, least), max(high, most))}
    _save(replace(start, intervals=intervals), said, "# cpu intervals")


def _intervals(measured: Mapping[str, list[Measured]], logs: list[float]) -> dict[str, tuple[float, float]]:
    """Of a run, and of the ratio of two layouts of a model in one precision."""
    import numpy as np

    low, high = (math.exp(float(x)) for x in np.quantile(logs, TAILS))
    left, pairs = iter(logs), []
    for found in measured.values():
        mine = [(one["precision"], log) for one, log in zip(found, left, strict=False)]
        near = [abs(a - b) for (p, a), (q, b) in combinations(mine, 2) if p == q]
        pairs += [(apart, 1 / len(near)) for apart in near]
    apart = math.exp(weighted_quantile(pairs, TAILS[1] - TAILS[0]))
    return {"cpu": (min(low / WIDER, 1.0), max(high * WIDER, 1.0)), "pairs.cpu": (1 / apart, apart)}


def _save(profile: Profile, said: str, instead: str) -> None:
    """Writes the shipped profile, `said` in its head in place of the line that begins with `instead`."""
    head = [line for line in DEFAULT_FILE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [*(line for line in head if not line.startswith(instead)), said]
    profile.save(DEFAULT_FILE)
    DEFAULT_FILE.write_text("\n".join(lines) + "\n" + DEFAULT_FILE.read_text(encoding="utf-8"), encoding="utf-8")
