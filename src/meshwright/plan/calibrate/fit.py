"""Constants that fit measured runs: Levenberg and Marquardt's method on their logarithms, with priors.

Each constant has a prior, a Gaussian around its start whose width says how far it is believed to be off; a few dozen
rows then suffice, and a constant that affects no row stays as it is. Residuals have pseudo-Huber losses (large ones
count linearly), so that an outlier does not decide the fit. Method: Levenberg 1944, Marquardt 1963; Madsen, Nielsen,
Tingleff, "Methods for Non-Linear Least Squares Problems" (2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Standard deviation of the logarithm of a run's time around a good model.
NOISE = 0.05
STEP = 0.02  # of a logarithm, in the finite differences
LARGEST_MOVE = 0.5  # of a logarithm, in one iteration
MOST_ITERATIONS = 12
#: A constant is not fitted if moving it by its prior's width changes no row by this share of the noise.
LEAST_EFFECT = 0.25
#: Accepted moves between two computations of the derivatives; in between they are updated (Broyden 1965).
FRESH_EVERY = 4


@dataclass(frozen=True)
class Prior:
    """Start of a constant, the standard deviation `width` of its logarithm, and its greatest value `most`."""

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


#: A function of (values of constants, indices of rows) to the logarithms of the rows' predicted seconds.
Predictions = Callable[[Mapping[str, float], "np.ndarray"], "np.ndarray"]


def slopes(model: Predictions, rows: int, priors: Sequence[Prior]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the predicted seconds of `rows` rows at the priors' starts, and their derivatives by the logarithm
    of each constant (rows x constants). Fits to several selections of the same rows need them once."""
    import numpy as np

    every, start = np.arange(rows), {prior.name: prior.start for prior in priors}
    logs = model(start, every)
    steps = [_step(math.log(prior.start), math.log(prior.most)) for prior in priors]
    moved = [{**start, prior.name: prior.start * math.exp(step)} for prior, step in zip(priors, steps, strict=True)]
    columns = [(model(values, every) - logs) / step for values, step in zip(moved, steps, strict=True)]
    return logs, np.array(columns).T.reshape(rows, len(priors))


def fit(
    model: Predictions,
    measured: np.ndarray,
    weights: np.ndarray,
    priors: Sequence[Prior],
    start_slopes: tuple[np.ndarray, np.ndarray] | None = None,
) -> FitResult:
    """The values that minimize the weighted losses of log(predicted / measured) and the distance from the priors.

    `measured` are logarithms of seconds. `start_slopes` is the result of `slopes`, if it was computed before.
    Deterministic; every prior needs a start and a width above zero.
    """
    import numpy as np

    problem = _FitProblem(model, measured, weights, priors)
    logs, derivatives = start_slopes or slopes(model, len(measured), priors)
    theta, r, table = problem.start.copy(), (logs - measured) / NOISE, derivatives / NOISE
    fitted = np.abs(table).max(axis=0, initial=0.0) * problem.widths > LEAST_EFFECT
    affected = (np.abs(table) > 1e-9) & fitted  # rows x constants: whether the constant affected the row at last
    table = table * fitted
    before = now = problem.loss(theta, r)
    damping, accepted = 1e-2, 0
    for _ in range(MOST_ITERATIONS):
        move = problem.move(theta, r, table, damping)
        new_r = problem.residuals(theta + move)
        new_loss = problem.loss(theta + move, new_r)
        if new_loss >= now:
            damping *= 6
            if damping > 1e4:
                break
            if accepted % FRESH_EVERY:  # the updated derivatives may be wrong, not the length of the move
                table, accepted = problem.derivatives(theta, r, affected), 0
            continue
        gain = now - new_loss
        error = new_r - r - table @ move
        table += np.outer(error, move) / max(float(move @ move), 1e-12) * affected
        theta, r, now, damping, accepted = theta + move, new_r, new_loss, damping / 4, accepted + 1
        if gain < 1e-3 * now:
            break
        if accepted % FRESH_EVERY == 0:  # every second time of all rows, since other rows may be affected now
            which = affected if accepted % (2 * FRESH_EVERY) else fitted | np.zeros_like(affected)
            table = problem.derivatives(theta, r, which)
            affected = np.abs(table) > 1e-9
    return FitResult(problem.values(theta), before, now)


class _FitProblem:
    """A least-squares problem: `theta` are logarithms of constants, residuals are in units of the noise."""

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
        r: np.ndarray = (self.model(self.values(theta), self.every) - self.measured) / NOISE
        return r

    def loss(self, theta: np.ndarray, r: np.ndarray) -> float:
        """Weighted pseudo-Huber losses, and the squared distance from the priors."""
        far = ((theta - self.start) / self.widths) ** 2
        return float(self.weights @ (2 * (1 + r * r) ** 0.5 - 2) + far.sum())

    def move(self, theta: np.ndarray, r: np.ndarray, table: np.ndarray, damping: float) -> np.ndarray:
        """The damped Gauss-Newton move, at most LARGEST_MOVE and within the bounds."""
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
                shifted, step = theta.copy(), _step(theta[column], self.most[column])
                shifted[column] += step
                logs = self.model(self.values(shifted), rows)
                table[rows, column] = ((logs - self.measured[rows]) / NOISE - r[rows]) / step
        return table


def _step(log: float, most: float) -> float:
    """The step of a difference at `log`: downwards where the greatest value, `most`, is near, since the model cuts
    there, and a constant that starts at it would seem to affect nothing."""
    return STEP if log + STEP <= most else -STEP


def balanced_weights(sources: Sequence[str], groups: Sequence[str], *, most_of_a_row: float = 3.0) -> list[float]:
    """One weight per row: every source has the same sum, and within a source every group; then each weight is cut to
    `most_of_a_row`. Before that cut the weights add up to the number of rows."""
    members: dict[str, dict[str, int]] = {}
    for source, group in zip(sources, groups, strict=True):
        members.setdefault(source, {}).setdefault(group, 0)
        members[source][group] += 1
    total = len(sources) / len(members)
    return [
        min(total / (len(members[source]) * members[source][group]), most_of_a_row)
        for source, group in zip(sources, groups, strict=True)
    ]


def spread_rows(groups: Sequence[str], count: int) -> list[int]:
    """Indices of `count` rows: one of each group in turn, at even distances within a group."""
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
    """The fold of each row. Rows of one key share a fold; folds are about equal. Deterministic."""
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    filled, place = [0] * min(count, len(sizes)), {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        place[key] = min(range(len(filled)), key=lambda fold: (filled[fold], fold))
        filled[place[key]] += sizes[key]
    return [place[key] for key in keys]
