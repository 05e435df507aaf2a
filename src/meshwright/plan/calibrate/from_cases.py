"""A profile from measured runs: constants, what they leave over, and intervals that held on runs not fitted.

1. The constants that the runs speak of are fitted (fit.py), every source and group with equal weight.
2. Per regime with enough runs the residuals become a smooth correction (correction.py), as strong as makes them
   likeliest. What it does to runs whose group was not fitted is told beside what they come to without.
3. The same refits give the intervals: the 5 % and 95 % quantiles of log(measured / predicted) over runs whose group was
   not fitted (split conformal prediction; Vovk et al. 2005, Lei et al. 2018), by regime where it has enough runs; and
   by how much the ratio of two layouts of a group is off.
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

#: Runs that a regime needs before it has a correction, and an interval, of its own.
FEWEST_TO_CORRECT, FEWEST_FOR_INTERVAL = 12, 18
#: Runs of one source that a fit looks at, and that corrections learn from: more tell little more and take long.
MOST_OF_A_SOURCE, MOST_POINTS_OF_A_SOURCE = 80, 200
FOLDS = 5
COVERAGE = 0.9


@dataclass(frozen=True)
class Row:
    """A measured run, ready for the estimator."""

    id: str
    run: ResolvedCase
    seconds: float
    source: str
    group: str
    model_key: str = ""

    @cached_property
    def words(self) -> tuple[str, str, str]:
        """The regime of its interval."""
        return interval_regime(self.run.workload)

    @cached_property
    def regime(self) -> str:
        """The regime of its correction."""
        return correction_regime(self.run.workload, self.run.layout)

    @cached_property
    def features(self) -> tuple[float, ...]:
        return features(self.run.workload, self.run.layout)


@dataclass(frozen=True)
class Residual:
    """A run that was not fitted, predicted by a profile that was: log(measured / predicted) without and with the
    correction, and how wide its interval is beside others of its regime."""

    row: Row
    plain: float
    corrected: float
    unit: float
    corrected_unit: float


@dataclass(frozen=True)
class Calibration:
    """The profile, and the account of how it came about."""

    profile: Profile
    rows: int
    skipped: tuple[BadCase, ...]
    moved: tuple[Mapping[str, Any], ...]
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
            "moved": list(self.moved),
            "corrections": {
                regime: {"points": len(one.residuals), "amplitude": one.amplitude, "noise": one.noise}
                for regime, one in self.profile.corrections.items()
            },
            "intervals": {regime: list(pair) for regime, pair in self.profile.intervals.items()},
        }


def resolve_rows(cases: Sequence[MeasuredCase]) -> tuple[list[Row], list[BadCase]]:
    """Cases that the estimator takes, and those that it does not with the reason."""
    rows, skipped = [], []
    for one in cases:
        try:
            found = resolve(one.case)
        except MeshwrightError as error:
            skipped.append(BadCase(one.case.id, error.problems))
            continue
        group = one.group or one.case.id
        rows.append(Row(one.case.id, found, one.step_seconds, one.source, group, one.model_key))
    return rows, skipped


def calibrate(
    cases: Sequence[MeasuredCase],
    start: Profile,
    *,
    name: str = "calibrated",
    correct: bool = True,
    skipped: Sequence[BadCase] = (),
) -> Calibration:
    """A profile fitted to measured cases, from `start`. `correct=False` leaves corrections out; `skipped` are lines
    that could not be read, for the account.

    Raises InputError where no case can be used, or fewer than three.
    """
    rows, more = resolve_rows(cases)
    skipped = [*skipped, *more]
    if len(rows) < 3:
        what = f"{len(rows)} measured runs that can be used"
        first = f"; the first that cannot: {skipped[0].error}" if skipped else ""
        raise InputError(Problem("cases", what + first, "give three or more, of several layouts"))
    return calibrate_rows(rows, start, name=name, correct=correct, skipped=skipped)


def calibrate_rows(
    rows: Sequence[Row],
    start: Profile,
    *,
    name: str = "calibrated",
    correct: bool = True,
    skipped: Sequence[BadCase] = (),
) -> Calibration:
    """`calibrate` of rows that are ready."""
    keys = held_out_keys(rows)
    fitter = _fitter(rows, start, keys)
    fitted = fit_profile(rows, start, name, fitter)
    residuals = held_out(rows, start, keys, correct=correct, fitter=fitter)
    profile = _with_corrections(fitted, rows) if correct else fitted
    tested, logs = [one.row for one in residuals], [one.corrected for one in residuals]
    intervals = {
        **conformal(tested, logs, [one.corrected_unit for one in residuals]),
        **pair_intervals(tested, logs),
    }
    profile = replace(profile, intervals={**start.intervals, **intervals}, fitted_rows=len(rows))
    return Calibration(
        profile=profile,
        rows=len(rows),
        skipped=tuple(skipped),
        moved=moves(start, profile),
        before=_mean_error(residual_logs(rows, start)),
        held_out=_mean_error(logs),
        held_out_plain=_mean_error([one.plain for one in residuals]),
        residuals=tuple(residuals),
    )


def fit_profile(rows: Sequence[Row], start: Profile, name: str, fitter: Fitter | None = None) -> Profile:
    """The start profile with the constants that the rows speak of fitted to them."""
    few = [rows[index] for index in _thinned(rows, MOST_OF_A_SOURCE)]
    profile = start.changed((fitter or Fitter(few, start)).fit(few).values, name)
    return replace(profile, assumed=(), corrections={})


class Fitter:
    """Fits constants to selections of rows; what the start profile says of each row is computed once for all."""

    def __init__(self, rows: Sequence[Row], start: Profile) -> None:
        self.start = Predictor(start)
        self.priors = [
            Prior(one.name, start[one.name], one.prior, bounds(one.name)[1])
            for one in CONSTANTS
            if one.prior > 0 and start[one.name] > 0
        ]
        self._rows = list(rows)
        self._place = {id(row): index for index, row in enumerate(self._rows)}  # ids of a file may repeat
        for row in rows:  # what does not depend on constants is kept in this predictor
            self.start.seconds(row.run)
        self._logs, self._slopes = slopes(self._model(rows), len(rows), self.priors)

    def fit(self, rows: Sequence[Row]) -> FitResult:
        """The values for these rows, every source and group with equal weight. Constants that matter to no row stay."""
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
    """Indices of at most so many rows of each source, spread over its groups."""
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
    """A fitter of every row that a fit to all rows, or to all folds but one, looks at."""
    fold_of = folds(keys, FOLDS)
    looked = set(_thinned(rows, MOST_OF_A_SOURCE))
    for fold in set(fold_of):
        inside = [index for index, place in enumerate(fold_of) if place != fold]
        looked |= {inside[place] for place in _thinned([rows[index] for index in inside], MOST_OF_A_SOURCE)}
    return Fitter([rows[index] for index in sorted(looked)], start)


def held_out(
    rows: Sequence[Row], start: Profile, keys: Sequence[str], *, correct: bool = True, fitter: Fitter | None = None
) -> list[Residual]:
    """Each row predicted by constants fitted to the folds that do not hold its key, and by a correction learnt from
    what those constants leave over at all rows of other keys."""
    fold_of, fitter = folds(keys, FOLDS), fitter or _fitter(rows, start, keys)
    points = set(_thinned(rows, MOST_POINTS_OF_A_SOURCE))
    found: dict[int, Residual] = {}
    for fold in sorted(set(fold_of)):
        inside = [row for row, place in zip(rows, fold_of, strict=True) if place != fold]
        profile = fit_profile(inside, start, "fold", fitter) if inside else start
        outside = [index for index, place in enumerate(fold_of) if place == fold]
        asked = sorted(points | set(outside)) if correct else outside
        logs = dict(zip(asked, residual_logs([rows[index] for index in asked], profile), strict=True))
        for key in dict.fromkeys(keys[index] for index in outside):
            mine = [index for index in outside if keys[index] == key]
            others = [index for index in logs if index in points and keys[index] != key]
            learnt = _learn([rows[i] for i in others], [logs[i] for i in others]) if correct else {}
            for index in mine:
                found[index] = _residual(rows[index], logs[index], learnt.get(rows[index].regime))
    return [found[index] for index in range(len(rows))]


def _residual(row: Row, log: float, correction: Correction | None) -> Residual:
    width = row.run.width
    if correction is None:
        return Residual(row, log, log, width, width)
    there = row.features
    spread = correction.spread(there) / correction.noise
    return Residual(row, log, log - math.log(correction.factor(there)), width, width * spread)


def _with_corrections(profile: Profile, rows: Sequence[Row]) -> Profile:
    """The profile with a correction of each regime that has enough rows."""
    chosen = [rows[index] for index in _thinned(rows, MOST_POINTS_OF_A_SOURCE)]
    return replace(profile, corrections=_learn(chosen, residual_logs(chosen, replace(profile, corrections={}))))


def _learn(rows: Sequence[Row], logs: Sequence[float]) -> dict[str, Correction]:
    """A correction of each regime that has enough rows."""
    by_regime: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for row, log in zip(rows, logs, strict=True):
        by_regime.setdefault(row.regime, []).append((row.features, log))
    found = {}
    for regime, points in by_regime.items():
        few = points[:: -(-len(points) // MOST_POINTS)]
        if len(few) >= FEWEST_TO_CORRECT:
            found[regime] = learn(regime, [features for features, _ in few], [log for _, log in few])
    return found


def conformal(rows: Sequence[Row], logs: Sequence[float], units: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Factors (low, high) by regime, such that 90 % of these runs lie between; a regime's name is its first words.

    Every source counts for as much (a row for three at most), so that none speaks for all, and its runs alike. With few
    runs the quantiles lie further out, as split conformal prediction has it: (n + 1) / n of the way. Runs of one layout
    of one model tell nothing of others: a regime has an interval of its own from so many different ones on, and a wider
    regime only where its runs are of several narrower ones.
    """
    by_regime: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        words = row.words
        for stop in range(1, len(words) + 1):
            by_regime.setdefault(".".join(words[:stop]), []).append(index)
    intervals = {}
    for regime, members in by_regime.items():
        kinds = {
            (rows[i].run.workload.card.name, rows[i].run.workload.card.units_per_sample, rows[i].run.layout)
            for i in members
        }
        narrower = {rows[i].words[: regime.count(".") + 2] for i in members}
        alone = len(narrower) == 1 and regime != ".".join(rows[members[0]].words)
        if len(kinds) >= FEWEST_FOR_INTERVAL and not alone:
            scores = [logs[index] / units[index] for index in members]
            weights = balanced_weights([rows[i].source for i in members], [str(i) for i in members])
            intervals[regime] = _quantiles(scores, weights)
    return intervals


def pair_intervals(rows: Sequence[Row], logs: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Factors (low, high) by "pairs" and kind of device: by so much the ratio of two layouts' times of the same group
    is predicted, for 90 % of the pairs. Every group counts for as much. What layouts of a group have in common is off
    for all of them alike, so two may be told apart that differ by less than their intervals."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.words[0], row.group), []).append(index)
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for (kind, _), members in groups.items():
        pairs = [(a, b) for a, b in combinations(members, 2) if rows[a].run.layout != rows[b].run.layout]
        by_kind.setdefault(kind, []).extend((abs(logs[a] - logs[b]), 1 / len(pairs)) for a, b in pairs)
    return {
        f"pairs.{kind}": (1 / apart, apart)
        for kind, found in by_kind.items()
        if len(found) >= FEWEST_FOR_INTERVAL and (apart := math.exp(weighted_quantile(found, COVERAGE)))
    }


def weighted_quantile(found: Sequence[tuple[float, float]], share: float) -> float:
    """The least value below or at which lies a `share` of the weights; (value, weight) each."""
    ordered, total = sorted(found), sum(weight for _, weight in found)
    passed = accumulate(weight for _, weight in ordered)
    reached = (value for (value, _), weight in zip(ordered, passed, strict=True) if weight >= share * total)
    return next(reached, ordered[-1][0])


def _quantiles(scores: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    count = len(scores)
    tail = max(0.0, 1 - (1 + COVERAGE) / 2 * (count + 1) / count)
    low = weighted_quantile(list(zip(scores, weights, strict=True)), tail)
    high = -weighted_quantile([(-score, weight) for score, weight in zip(scores, weights, strict=True)], tail)
    return math.exp(min(low, 0.0)), math.exp(max(high, 0.0))


def moves(start: Profile, profile: Profile) -> tuple[Mapping[str, Any], ...]:
    """Constants that differ by more than 1 %, the largest moves first, in units of what was believed possible."""
    found = []
    for one in CONSTANTS:
        before, after = start[one.name], profile[one.name]
        if before > 0 and after > 0 and abs(math.log(after / before)) > 0.01:
            widths = math.log(after / before) / one.prior if one.prior else 0.0
            found.append({"constant": one.name, "unit": one.unit, "from": before, "to": after, "sigmas": widths})
    return tuple(sorted(found, key=lambda row: (-abs(row["sigmas"]), row["constant"])))


def held_out_keys(rows: Sequence[Row]) -> list[str]:
    """What is held out together: groups, or single runs in a regime of too few groups."""
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row.regime, set()).add(row.group)
    many = {regime for regime, found in groups.items() if len(found) >= FOLDS}
    return [f"group {row.group}" if row.regime in many else f"run {row.id}" for row in rows]


def _mean_error(logs: Sequence[float]) -> float:
    """Mean of |predicted / measured - 1| of logarithms of measured over predicted."""
    return sum(abs(math.expm1(-log)) for log in logs) / len(logs) if logs else 0.0
