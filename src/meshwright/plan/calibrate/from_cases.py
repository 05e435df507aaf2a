"""A profile from measured runs: constants, corrections, and intervals that held on runs that were not fitted.

1. The constants that affect the runs are fitted (fit.py), every source and group with equal weight.
2. In each regime with enough runs the residuals become a smooth correction (correction.py). The error with and without
   it is reported for runs whose group was not fitted.
3. The same refits give the intervals: the 5 % and 95 % quantiles of log(measured / predicted) over runs whose group was
   not fitted (split conformal prediction; Vovk et al. 2005, Lei et al. 2018), for each regime with enough runs; and the
   error of the ratio of two layouts of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, combinations
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, MeshwrightError, Problem
from meshwright.plan.calibrate.fit import (
    FitResult,
    Predictions,
    Prior,
    balanced_weights,
    fit,
    folds,
    slopes,
    spread_rows,
)
from meshwright.plan.cases import BadCase, MeasuredCase, Predictor
from meshwright.plan.cases.resolve import ResolvedCase, resolve
from meshwright.plan.constants import Profile
from meshwright.plan.constants.correction import MOST_POINTS, Correction, learn
from meshwright.plan.constants.gpu import CONSTANTS
from meshwright.plan.constants.profile import bounds
from meshwright.plan.constants.regime import correction_regime, features, interval_regime

if TYPE_CHECKING:
    import numpy as np

#: Runs that a regime needs for a correction, and pairs of runs for the interval of their ratio.
FEWEST_TO_CORRECT, FEWEST_PAIRS = 12, 18
#: Runs of one source that a fit, and that corrections, use: more take longer and add little.
MOST_OF_A_SOURCE, MOST_POINTS_OF_A_SOURCE = 80, 200
FOLDS = 5
COVERAGE = 0.9


@dataclass(frozen=True)
class Row:
    """A measured run for the estimator."""

    id: str
    run: ResolvedCase
    seconds: float
    source: str
    group: str
    model_key: str = ""

    @cached_property
    def interval_regime(self) -> tuple[str, str, str]:
        return interval_regime(self.run.workload)

    @cached_property
    def correction_regime(self) -> str:
        return correction_regime(self.run.workload, self.run.layout)

    @cached_property
    def features(self) -> tuple[float, ...]:
        return features(self.run.workload, self.run.layout)


@dataclass(frozen=True)
class Residual:
    """A row by a profile that was fitted without its group: log(measured / predicted) without (`plain`) and with the
    correction, and with it the width of its interval relative to the regime's."""

    row: Row
    plain: float
    corrected: float
    width: float


@dataclass(frozen=True)
class Calibration:
    """The profile, and how it was made."""

    profile: Profile
    rows: int
    skipped: tuple[BadCase, ...]
    moves: tuple[Mapping[str, Any], ...]
    before: float  # mean relative error of the runs by the start profile
    held_out: float  # mean relative error of runs whose group was not fitted
    held_out_plain: float  # the same without corrections
    residuals: tuple[Residual, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What `meshwright calibrate` prints."""
        return {
            "profile": self.profile.name,
            "rows": self.rows,
            "skipped": [{"id": bad.id, "error": bad.error} for bad in self.skipped],
            "mean_error": {
                "before": self.before,
                "held_out": self.held_out,
                "held_out_without_corrections": self.held_out_plain,
            },
            "moved": list(self.moves),
            "corrections": {
                regime: {"points": len(one.residuals), "amplitude": one.amplitude, "noise": one.noise}
                for regime, one in self.profile.corrections.items()
            },
            "intervals": {regime: list(pair) for regime, pair in self.profile.intervals.items()},
        }


def resolve_rows(cases: Sequence[MeasuredCase]) -> tuple[list[Row], list[BadCase]]:
    """The rows of cases that the estimator can predict, and the other cases with the reason."""
    rows, skipped = [], []
    for one in cases:
        try:
            run = resolve(one.case)
        except MeshwrightError as error:
            skipped.append(BadCase(one.case.id, error.problems))
            continue
        group = one.group or one.case.id
        rows.append(Row(one.case.id, run, one.step_seconds, one.source, group, one.model_key))
    return rows, skipped


def calibrate(
    cases: Sequence[MeasuredCase],
    start: Profile,
    *,
    name: str = "calibrated",
    skipped: Sequence[BadCase] = (),
) -> Calibration:
    """A profile fitted to measured cases, from `start`; `skipped` are unreadable lines, for the report.

    Raises InputError where fewer than three cases can be used.
    """
    rows, more = resolve_rows(cases)
    skipped = [*skipped, *more]
    if len(rows) < 3:
        what = f"{len(rows)} measured runs that can be used"
        first = f"; the first that cannot: {skipped[0].error}" if skipped else ""
        raise InputError(Problem("cases", what + first, "give three or more, of several layouts"))
    return calibrate_rows(rows, start, name=name, skipped=skipped)


def calibrate_rows(
    rows: Sequence[Row],
    start: Profile,
    *,
    name: str = "calibrated",
    correct: bool = True,
    skipped: Sequence[BadCase] = (),
) -> Calibration:
    """`calibrate` for resolved rows. `correct=False` leaves corrections out."""
    keys = held_out_keys(rows)
    fitter = _fitter(rows, start, keys)
    fitted = fit_profile(rows, start, name, fitter)
    residuals = held_out(rows, start, keys, correct=correct, fitter=fitter)
    profile = _with_corrections(fitted, rows) if correct else fitted
    logs = [one.corrected for one in residuals]
    intervals = {**start.intervals, **conformal(rows, logs, [one.width for one in residuals], start)}
    profile = replace(profile, intervals={**intervals, **pair_intervals(rows, logs)}, fitted_rows=len(rows))
    return Calibration(
        profile=profile,
        rows=len(rows),
        skipped=tuple(skipped),
        moves=moves(start, profile),
        before=_mean_error(residual_logs(rows, start)),
        held_out=_mean_error(logs),
        held_out_plain=_mean_error([one.plain for one in residuals]),
        residuals=tuple(residuals),
    )


def fit_profile(rows: Sequence[Row], start: Profile, name: str, fitter: Fitter) -> Profile:
    """The start profile with the constants that affect the rows fitted to them."""
    few = [rows[index] for index in _thinned(rows, MOST_OF_A_SOURCE)]
    return replace(start.changed(fitter.fit(few).values, name), assumed=(), corrections={})


class Fitter:
    """Fits constants to selections of rows; the start profile's predictions of each row are computed once for all."""

    def __init__(self, rows: Sequence[Row], start: Profile) -> None:
        self.start = Predictor(start)
        self.priors = [
            Prior(one.name, start[one.name], one.prior, bounds(one.name)[1])
            for one in CONSTANTS
            if one.prior > 0 and start[one.name] > 0
        ]
        self._rows = list(rows)
        self._place = {id(row): index for index, row in enumerate(self._rows)}  # the ids in a file may repeat
        for row in rows:  # this predictor caches what does not depend on constants
            self.start.seconds(row.run)
        self._logs, self._slopes = slopes(self._model(rows), len(rows), self.priors)

    def fit(self, rows: Sequence[Row]) -> FitResult:
        """The values for these rows, every source and group with equal weight. Constants that affect no row stay."""
        import numpy as np

        places = [self._place[id(row)] for row in rows]
        weights = np.array(balanced_weights([row.source for row in rows], [row.group for row in rows]))
        measured = np.log([row.seconds for row in rows])
        return fit(self._model(rows), measured, weights, self.priors, (self._logs[places], self._slopes[places]))

    def _model(self, rows: Sequence[Row]) -> Predictions:
        import numpy as np

        def model(values: Mapping[str, float], chosen: np.ndarray) -> np.ndarray:
            predictor = self.start.with_profile(self.start.profile.changed(values))
            return np.log([predictor.seconds(rows[index].run) for index in chosen])

        return model


def _thinned(rows: Sequence[Row], most: int) -> list[int]:
    """Indices of at most `most` rows of each source, spread over its groups."""
    by_source: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_source.setdefault(row.source, []).append(index)
    picked: list[int] = []
    for indices in by_source.values():
        few = spread_rows([rows[index].group for index in indices], most)
        picked += [indices[place] for place in few]
    return sorted(picked)


def residual_logs(rows: Sequence[Row], profile: Profile) -> list[float]:
    """log(measured / predicted) of each row, corrections included."""
    predictor = Predictor(profile)
    return [math.log(row.seconds / (predictor.seconds(row.run) * predictor.factor(row.run))) for row in rows]


def _fitter(rows: Sequence[Row], start: Profile, keys: Sequence[str]) -> Fitter:
    """A fitter of every row that a fit to all rows, or to all folds but one, uses."""
    fold_of = folds(keys, FOLDS)
    used = set(_thinned(rows, MOST_OF_A_SOURCE))
    for fold in set(fold_of):
        inside = [index for index, place in enumerate(fold_of) if place != fold]
        used |= {inside[place] for place in _thinned([rows[index] for index in inside], MOST_OF_A_SOURCE)}
    return Fitter([rows[index] for index in sorted(used)], start)


def held_out(
    rows: Sequence[Row], start: Profile, keys: Sequence[str], *, correct: bool = True, fitter: Fitter | None = None
) -> list[Residual]:
    """The residual of each row, by constants fitted to the folds without its key, and by a correction learnt from the
    residuals of all rows of other keys."""
    fold_of, fitter = folds(keys, FOLDS), fitter or _fitter(rows, start, keys)
    counts = _group_counts(rows)
    points = set(_thinned(rows, MOST_POINTS_OF_A_SOURCE))
    residuals: dict[int, Residual] = {}
    for fold in sorted(set(fold_of)):
        inside = [row for row, place in zip(rows, fold_of, strict=True) if place != fold]
        profile = fit_profile(inside, start, "fold", fitter) if inside else start
        outside = [index for index, place in enumerate(fold_of) if place == fold]
        predicted = sorted(points | set(outside)) if correct else outside
        logs = dict(zip(predicted, residual_logs([rows[index] for index in predicted], profile), strict=True))
        for key in dict.fromkeys(keys[index] for index in outside):
            others = [index for index in logs if index in points and keys[index] != key]
            learnt = _learn([rows[i] for i in others], [logs[i] for i in others], counts) if correct else {}
            for index in (index for index in outside if keys[index] == key):
                correction = learnt.get(rows[index].correction_regime)
                residuals[index] = _residual(rows[index], logs[index], correction)
    return [residuals[index] for index in range(len(rows))]


def _residual(row: Row, log: float, correction: Correction | None) -> Residual:
    width = row.run.width
    if correction is None:
        return Residual(row, log, log, width)
    width *= correction.width(row.features)
    return Residual(row, log, log - math.log(correction.factor(row.features)), width)


def _with_corrections(profile: Profile, rows: Sequence[Row]) -> Profile:
    """The profile with a correction for each regime that has enough rows."""
    chosen = [rows[index] for index in _thinned(rows, MOST_POINTS_OF_A_SOURCE)]
    logs = residual_logs(chosen, replace(profile, corrections={}))
    return replace(profile, corrections=_learn(chosen, logs, _group_counts(rows)))


def _group_counts(rows: Sequence[Row]) -> dict[str, int]:
    """The number of groups of runs in each correction's regime."""
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row.correction_regime, set()).add(row.group)
    return {regime: len(names) for regime, names in groups.items()}


def _learn(rows: Sequence[Row], logs: Sequence[float], groups: Mapping[str, int]) -> dict[str, Correction]:
    """A correction for each regime that has enough rows, with its number of `groups`: that of all rows, so that the
    widths of residuals that are held out are those of the whole correction."""
    by_regime: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for row, log in zip(rows, logs, strict=True):
        by_regime.setdefault(row.correction_regime, []).append((row.features, log))
    corrections = {}
    for regime, points in by_regime.items():
        few = points[:: -(-len(points) // MOST_POINTS)]
        if len(few) >= FEWEST_TO_CORRECT:
            places, logs_there = zip(*few, strict=True)
            corrections[regime] = learn(regime, places, logs_there, groups[regime])
    return corrections


def conformal(
    rows: Sequence[Row], logs: Sequence[float], widths: Sequence[float], start: Profile
) -> dict[str, tuple[float, float]]:
    """Factors (low, high) by regime that 90 % of the runs of a new group lie between; a regime's name is its first
    words.

    Conformal prediction for runs in groups (Dunn, Wasserman, Ramdas 2022; Lee, Barber, Willett 2023): runs of a group
    err alike, so groups are counted, not runs. Every source has the same weight, and every group within it (a row at
    most three). The new group counts as one more that errs further than all others, and than the interval of the next
    wider regime, or of the start, says: with fewer than FEWEST_GROUPS groups, that decides. Intervals are symmetric in
    the logarithm, since the errors of few groups do not tell the sign of the next one's. A wider regime needs runs of
    several narrower ones.
    """
    by_regime: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        for stop in range(1, len(row.interval_regime) + 1):
            by_regime.setdefault(row.interval_regime[:stop], []).append(index)
    known, found = start, {}
    for words, members in sorted(by_regime.items(), key=lambda item: len(item[0])):
        narrower = {rows[i].interval_regime[: len(words) + 1] for i in members}
        if len(narrower) > 1 or words == rows[members[0]].interval_regime:
            groups = [rows[i].group for i in members]
            weights = balanced_weights([rows[i].source for i in members], groups)
            errors = [(abs(logs[i]) / widths[i], weight) for i, weight in zip(members, weights, strict=True)]
            low, high = known.interval(*words)
            furthest = max(-math.log(low), math.log(high), *(error for error, _ in errors))
            errors.append((furthest, sum(weights) / len(set(groups))))
            factor = math.exp(weighted_quantile(errors, COVERAGE))
            found[".".join(words)] = 1 / factor, factor
            known = replace(start, intervals={**start.intervals, **found})
    return found


def pair_intervals(rows: Sequence[Row], logs: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Factors (low, high) by "pairs" and kind of device, between which 90 % of the ratios of two layouts' times in a
    group lie, relative to the predicted ratio. Every group has the same weight. Errors that layouts of a group have in
    common cancel, so two layouts may be distinguished whose difference is less than their intervals."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.interval_regime[0], row.group), []).append(index)
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for (kind, _), members in groups.items():
        pairs = [(a, b) for a, b in combinations(members, 2) if rows[a].run.layout != rows[b].run.layout]
        by_kind.setdefault(kind, []).extend((abs(logs[a] - logs[b]), 1 / len(pairs)) for a, b in pairs)
    return {
        f"pairs.{kind}": (1 / apart, apart)
        for kind, errors in by_kind.items()
        if len(errors) >= FEWEST_PAIRS and (apart := math.exp(weighted_quantile(errors, COVERAGE)))
    }


def weighted_quantile(values: Sequence[tuple[float, float]], share: float) -> float:
    """The least value of the pairs (value, weight) at or below which a `share` of the weight lies."""
    ordered, total = sorted(values), sum(weight for _, weight in values)
    passed = accumulate(weight for _, weight in ordered)
    reached = (value for (value, _), weight in zip(ordered, passed, strict=True) if weight >= share * total)
    return next(reached, ordered[-1][0])


def moves(start: Profile, profile: Profile) -> tuple[Mapping[str, Any], ...]:
    """Constants that differ by more than 1 %, the largest move in standard deviations of the prior first."""
    rows = []
    for one in CONSTANTS:
        before, after = start[one.name], profile[one.name]
        if before > 0 and after > 0 and abs(math.log(after / before)) > 0.01:
            widths = math.log(after / before) / one.prior if one.prior else 0.0
            rows.append({"constant": one.name, "unit": one.unit, "from": before, "to": after, "sigmas": widths})
    return tuple(sorted(rows, key=lambda row: (-abs(row["sigmas"]), row["constant"])))


def held_out_keys(rows: Sequence[Row]) -> list[str]:
    """The key of each row, under which rows are held out together: its group, or itself in a regime of few groups."""
    many = {regime for regime, count in _group_counts(rows).items() if count >= FOLDS}
    return [f"group {row.group}" if row.correction_regime in many else f"run {row.id}" for row in rows]


def _mean_error(logs: Sequence[float]) -> float:
    """Mean of |predicted / measured - 1|, from logarithms of measured over predicted."""
    return sum(abs(math.expm1(-log)) for log in logs) / len(logs) if logs else 0.0
