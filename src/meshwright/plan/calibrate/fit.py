"""Constants that fit measured runs: Levenberg and Marquardt on their logarithms, held near where they started.

Each constant has a prior, a Gaussian around its start whose width says how far it is believed to be off; a few dozen
rows then suffice, and a constant that no row speaks of stays where it is. Residuals count as pseudo-Huber losses (large
ones by their size, not its square), so that no odd run drags the rest. Method: Levenberg 1944, Marquardt 1963; Madsen,
Nielsen, Tingleff, "Methods for Non-Linear Least Squares Problems" (2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: What a run strays from a good model, as the standard deviation of the logarithm of its time.
NOISE = 0.05
STEP = 0.02  # of a logarithm, in the differences that stand for derivatives
LARGEST_MOVE = 0.5  # of a logarithm, in one iteration
MOST_ITERATIONS = 12
#: A constant is left where it is if moving it by its prior's width changes no row by this share of the noise.
LEAST_EFFECT = 0.25
#: The derivatives are computed anew after so many accepted moves, and estimated (Broyden 1965) in between.
FRESH_EVERY = 4


@dataclass(frozen=True)
class Prior:
    """Where a constant starts and how far it may go: `width` is the standard deviation of its logarithm, `most` what it
    cannot exceed."""

    name: str
    start: float
    width: float
    most: float = math.inf


@dataclass(frozen=True)
class FitResult:
    """Values by name, and the loss before and after."""

    values: Mapping[str, float]
    loss_before: float
    loss_after: float
    iterations: int


#: Logarithms of predicted seconds at the given values, of all rows or of those marked.
Predictions = Callable[[Mapping[str, float], "np.ndarray"], "np.ndarray"]


def slopes(model: Predictions, rows: int, priors: Sequence[Prior]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the predicted seconds of `rows` rows at the priors' starts, and their derivatives by the logarithm
    of each constant. Fits to several selections of the same rows need them once."""
    import numpy as np

    every, start = np.arange(rows), {prior.name: prior.start for prior in priors}
    now = model(start, every)
    columns = [(model({**start, prior.name: prior.start * math.exp(STEP)}, every) - now) / STEP for prior in priors]
    return now, np.array(columns).T.reshape(rows, len(priors))


def fit(
    model: Predictions,
    measured: np.ndarray,
    weights: np.ndarray,
    priors: Sequence[Prior],
    start_slopes: tuple[np.ndarray, np.ndarray] | None = None,
) -> FitResult:
    """The values that make the weighted losses of log(predicted / measured) and the distance from the priors least.

    `model(values, rows)` answers the logarithms of the predicted seconds of the rows whose indices are given.
    `start_slopes` are those of `slopes`, if they are there already. Deterministic; constants whose prior width or start
    is zero must not be among the priors.
    """
    import numpy as np

    task = _Task(model, measured, weights, priors)
    logs, first = start_slopes or slopes(model, len(measured), priors)
    theta, r, table = task.start.copy(), (logs - measured) / NOISE, first / NOISE
    spoken = np.abs(table).max(axis=0, initial=0.0) * task.widths > LEAST_EFFECT
    known = (np.abs(table) > 1e-9) & spoken  # rows that a constant was last seen to matter to
    table = table * spoken
    before = now = task.loss(theta, r)
    damping, accepted, iteration = 1e-2, 0, 0
    while iteration < MOST_ITERATIONS:
        iteration += 1
        move = task.move(theta, r, table, damping)
        tried = task.residuals(theta + move)
        then = task.loss(theta + move, tried)
        if then >= now:
            damping *= 6
            if damping > 1e4:
                break
            if accepted % FRESH_EVERY:  # the estimate may be at fault, not the length of the move
                table, accepted = task.derivatives(theta, r, known), 0
            continue
        gain = now - then
        error = tried - r - table @ move
        table += np.outer(error, move) / max(float(move @ move), 1e-12) * known
        theta, r, now, damping, accepted = theta + move, tried, then, damping / 4, accepted + 1
        if gain < 1e-3 * now:
            break
        if accepted % FRESH_EVERY == 0:  # every second time of all rows: what mattered to none may matter now
            table = task.derivatives(theta, r, known if accepted % (2 * FRESH_EVERY) else spoken | np.zeros_like(known))
            known = np.abs(table) > 1e-9
    return FitResult(task.values(theta), before, now, iteration)


class _Task:
    """What is fitted to what, with logarithms of constants as `theta` and residuals in units of the noise."""

    def __init__(self, model: Predictions, measured: np.ndarray, weights: np.ndarray, priors: Sequence[Prior]) -> None:
        import numpy as np

        self.model, self.measured, self.weights = model, measured, weights
        self.names = [prior.name for prior in priors]
        self.every = np.arange(len(measured))
        self.start = np.log([prior.start for prior in priors])
        self.widths = np.array([prior.width for prior in priors])
        self.most = np.log([max(prior.most, prior.start) for prior in priors])

    def values(self, theta: np.ndarray) -> dict[str, float]:
        return {name: math.exp(x) for name, x in zip(self.names, theta, strict=True)}

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        found: np.ndarray = (self.model(self.values(theta), self.every) - self.measured) / NOISE
        return found

    def loss(self, theta: np.ndarray, r: np.ndarray) -> float:
        """Weighted pseudo-Huber losses, and the squared distance from the priors."""
        far = ((theta - self.start) / self.widths) ** 2
        return float(self.weights @ (2 * (1 + r * r) ** 0.5 - 2) + far.sum())

    def move(self, theta: np.ndarray, r: np.ndarray, table: np.ndarray, damping: float) -> np.ndarray:
        """The damped Gauss-Newton move, no longer than may be and within the bounds."""
        import numpy as np

        share = self.weights / np.sqrt(1 + r * r)
        curve = (table.T * share) @ table + np.diag(1 / self.widths**2)
        slope = table.T @ (share * r) + (theta - self.start) / self.widths**2
        move = np.linalg.solve(curve + damping * np.diag(np.diag(curve)), -slope)
        move *= min(1.0, LARGEST_MOVE / max(float(np.max(np.abs(move))), 1e-12))
        bounded: np.ndarray = np.minimum(theta + move, self.most) - theta
        return bounded

    def derivatives(self, theta: np.ndarray, r: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals, by differences, where `which` (rows x constants) is set; zero elsewhere."""
        import numpy as np

        table = np.zeros((len(r), len(theta)))
        for column in range(len(theta)):
            rows = self.every[which[:, column]]
            if len(rows):
                moved = theta.copy()
                moved[column] += STEP
                logs = self.model(self.values(moved), rows)
                table[rows, column] = ((logs - self.measured[rows]) / NOISE - r[rows]) / STEP
        return table


def balanced_weights(sources: Sequence[str], groups: Sequence[str], *, most_of_a_row: float = 3.0) -> list[float]:
    """A weight a row, such that every source has the same sum, and in a source every group, as far as no row counts for
    more than `most_of_a_row`. The weights of all rows add up to their number, but for that bound."""
    members: dict[str, dict[str, int]] = {}
    for source, group in zip(sources, groups, strict=True):
        members.setdefault(source, {}).setdefault(group, 0)
        members[source][group] += 1
    total = len(sources) / len(members)
    weights = []
    for source, group in zip(sources, groups, strict=True):
        share = total / (len(members[source]) * members[source][group])
        weights.append(min(share, most_of_a_row))
    return weights


def spread_rows(groups: Sequence[str], count: int) -> list[int]:
    """Indices of `count` rows spread over the groups: one of each in turn, those within a group at even distances."""
    if count >= len(groups):
        return list(range(len(groups)))
    by_group: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        by_group.setdefault(group, []).append(index)
    queues = []
    for place, rows in enumerate(by_group.values()):
        stride = next(s for s in range(max(1, round(len(rows) * 0.618)), len(rows) + 1) if math.gcd(s, len(rows)) == 1)
        queues.append([rows[(place * 5 + k * stride) % len(rows)] for k in range(len(rows))])
    picked: list[int] = []
    for turn in range(max(map(len, queues))):
        picked += [queue[turn] for queue in queues if turn < len(queue)]
    return sorted(picked[:count])


def folds(keys: Sequence[str], count: int) -> list[int]:
    """The fold of each row: all rows of a key are in one, and folds are about equal. Deterministic."""
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    filled, place = [0] * min(count, len(sizes)), {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        place[key] = min(range(len(filled)), key=lambda fold: (filled[fold], fold))
        filled[place[key]] += sizes[key]
    return [place[key] for key in keys]
