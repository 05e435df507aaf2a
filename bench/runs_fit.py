"""The CPU constants fitted to measured runs of `bench.runs`, and what such a fit is worth on a model it did not see."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.runs import Measured, card_of, estimate, median_seconds, noise
from bench.runs_models import MODELS
from meshwright.cluster import cpu_cluster
from meshwright.layout import Layout
from meshwright.plan.cpu_constants import CPU_CONSTANTS
from meshwright.plan.fit import Prior, fit
from meshwright.plan.from_machine import INTERVAL as MACHINE_INTERVAL
from meshwright.plan.from_machine import machine_profile
from meshwright.plan.profile import DEFAULT_FILE, Profile, default_profile

#: Intervals are stated for 90 %, and kept wider than what was found: four models are few (the demo's is a fifth).
TAILS, WIDER = (0.05, 0.95), 1.2


def unfitted() -> Profile:
    """The shipped profile with its CPU constants as microbenchmarks gave them."""
    return default_profile().changed({one.name: one.value for one in CPU_CONSTANTS})


def fitted(measured: Mapping[str, Sequence[Measured]], without: str = "") -> Profile:
    """CPU constants that fit the runs of every model but `without`."""
    import numpy as np

    rows = [(model, one) for model, found in measured.items() if model != without for one in found]
    cards = {model: card_of(model) for model in measured}
    start = unfitted()

    def logs(values: Mapping[str, float], which: Any) -> Any:
        profile = start.changed(values)
        chosen = [rows[index] for index in which]
        return np.log([estimate(cards[m], one, MODELS[m][2], profile).step_seconds for m, one in chosen])

    priors = [Prior(one.name, start[one.name], one.prior) for one in CPU_CONSTANTS]
    seconds = np.log([median_seconds(one) for _, one in rows])
    found = fit(logs, seconds, np.ones(len(rows)), priors)
    return start.changed(found.values, "without " + without if without else "fitted")


def held_out(
    measured: Mapping[str, Sequence[Measured]], machine: Mapping[str, Any] | None = None
) -> tuple[str, list[float]]:
    """A table, each model predicted by constants fitted to the others; and log(measured / predicted) of every run.

    With `machine`, what `probe.machine` found, by those constants as `calibrate machine` would change them.
    """
    title = "Each model by constants fitted to the other models' runs"
    lines = ["", f"{title}, then by `calibrate machine`:" if machine else f"{title}:", ""]
    lines += ["| model | layout | measured, s | predicted, s | error | noise |", "|---|---|---|---|---|---|"]
    summary, logs = [], []
    for model, found in measured.items():
        profile, card = fitted(measured, without=model), card_of(model)
        if machine:
            profile = machine_profile(machine, cpu_cluster(), profile, "machine")
        guesses = [estimate(card, one, MODELS[model][2], profile).step_seconds for one in found]
        seconds = [median_seconds(one) for one in found]
        errors = [guess / second - 1 for guess, second in zip(guesses, seconds, strict=True)]
        logs += [math.log(second / guess) for guess, second in zip(guesses, seconds, strict=True)]
        for one, guess, second, error in zip(found, guesses, seconds, errors, strict=True):
            name = f"{Layout(**one['layout'])} {one['precision']}"
            lines.append(f"| {model} | {name} | {second:.3f} | {guess:.3f} | {error:+.0%} | {noise(one):.0%} |")
        regrets = []
        for precision in sorted({one["precision"] for one in found}):
            group = [index for index, one in enumerate(found) if one["precision"] == precision]
            picked = min(group, key=lambda index: guesses[index])
            regrets.append(f"{precision} {seconds[picked] / min(seconds[index] for index in group) - 1:.0%}")
        summary.append(
            f"| {model} | {len(found)} | {statistics.fmean(map(abs, errors)):.1%} | {statistics.fmean(errors):+.1%} "
            f"| {max(map(abs, errors)):.0%} | {statistics.fmean(map(noise, found)):.1%} | {', '.join(regrets)} |"
        )
    lines += [
        "",
        "| model | runs | mean error | bias | largest | noise | regret of the pick |",
        "|---|---|---|---|---|---|---|",
    ]
    if machine:
        covered = statistics.fmean(MACHINE_INTERVAL[0] <= math.exp(log) <= MACHINE_INTERVAL[1] for log in logs)
        summary.append(f"| in the interval | {covered:.0%} |")
    mean = statistics.fmean(abs(math.exp(-log) - 1) for log in logs)
    return "\n".join([*lines, *summary, "", f"Mean error of all {len(logs)} runs: {mean:.1%}"]), logs


def write_default(measured: Mapping[str, Sequence[Measured]]) -> None:
    """The shipped profile with CPU constants fitted to all the runs, and the interval that models held out ask for."""
    import numpy as np

    _, logs = held_out(measured)
    low, high = (math.exp(float(x)) for x in np.quantile(logs, TAILS))
    interval = (min(low / WIDER, 1.0), max(high * WIDER, 1.0))
    start = default_profile()
    values = {one.name: fitted(measured)[one.name] for one in CPU_CONSTANTS}
    profile = replace(start.changed(values), intervals={**start.intervals, "cpu": interval})
    head = [line for line in DEFAULT_FILE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    said = f"# cpu.*: written by `python -m bench.runs --write-default` from {len(logs)} runs on two cores of an EPYC."
    profile.save(DEFAULT_FILE)
    lines = [*(line for line in head if not line.startswith("# cpu.")), said]
    DEFAULT_FILE.write_text("\n".join(lines) + "\n" + DEFAULT_FILE.read_text(encoding="utf-8"), encoding="utf-8")
