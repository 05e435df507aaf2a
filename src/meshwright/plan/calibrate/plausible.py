"""Measured times that are too far from the prediction to be right, most likely because of another unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from meshwright.errors import InputError, Problem
from meshwright.plan.calibrate.from_cases import resolve_rows
from meshwright.plan.cases import BadCase, MeasuredCase, Predictor
from meshwright.plan.constants import Profile

#: A measured time this many times longer or shorter than predicted is wrong.
TOO_FAR = 100.0
#: Units per second.
UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9, "hours": 1 / 3600}


def implausible(measured: float, predicted: float) -> bool:
    """Whether a measured time is too far from the prediction to be right."""
    return not 1 / TOO_FAR <= measured / predicted <= TOO_FAR


def comparison(measured: float, predicted: float) -> str:
    """Two times in seconds, in words."""
    return f"{measured:.3g} s, {measured / predicted:.2g} times the {predicted:.3g} s that are predicted"


def unit_hint(measured: float, predicted: float) -> str:
    """What to give instead, and the unit that the time is likely in."""
    ratio = math.log(max(measured / predicted, 1e-300))
    unit = min(UNITS, key=lambda name: abs(ratio - math.log(UNITS[name])))
    near = abs(ratio - math.log(UNITS[unit])) < math.log(30)
    return "give the seconds of a whole step" + (f": these look like {unit}" if near else "")


def plausible_cases(
    cases: Sequence[MeasuredCase], start: Profile, where: str
) -> tuple[list[MeasuredCase], list[BadCase]]:
    """Cases for a fit from `start`, and those whose measured time is implausible.

    Raises InputError, naming the file `where`, if more than half of the predictable cases are implausible.
    """
    predictor, predicted = Predictor(start), 0
    good: list[MeasuredCase] = []
    bad: list[BadCase] = []
    for one in cases:
        rows, _ = resolve_rows([one])
        predicted += len(rows)
        times = [(row.seconds, predictor.seconds(row.run)) for row in rows]
        if times and implausible(*times[0]):
            problem = Problem("measured.step_seconds", f"is {comparison(*times[0])}", unit_hint(*times[0]))
            bad.append(BadCase(one.case.id, (problem,)))
        else:
            good.append(one)
    if 2 * len(bad) > predicted:
        first = bad[0].problems[0]
        what = f"{len(bad)} of {predicted} runs took more than {TOO_FAR:g} times longer or shorter than predicted"
        raise InputError(Problem(where, f"{what}: {first.where} of {bad[0].id} {first.what}", first.nearest))
    return good, bad
