"""A smooth factor on predicted times near measured layouts, learnt from the error that fitted constants leave.

Libraries change algorithm with the size of a message or a product, which no constant describes. Where runs of one
regime (same device, framework, precision, recompute and extent) were measured, log(measured / predicted) is
interpolated between them by simple kriging (a Gaussian process with a fixed kernel): exact where many runs agree, and
fading to a factor of 1 away from them. Its amplitude and noise are those that make the runs likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem

if TYPE_CHECKING:
    import numpy as np

#: Features, all binary logarithms, with the kernel's length scale in each: about a doubling for those that decide
#: algorithms (the split, the micro-batch, the width), more for those that scale smoothly.
SCALES: Mapping[str, float] = {
    "tp": 0.7,
    "micro_batch": 1.0,
    "hidden": 1.5,
    "seq_len": 1.5,
    "pp": 6.0,
    "data_ranks": 12.0,
    "micro_batches": 12.0,
    "layers": 8.0,
}
MOST_POINTS = 1000
#: Groups of runs from which a 90 % interval follows: with a chance of one in ten, one more lies outside all nine.
FEWEST_GROUPS = 9


@dataclass(frozen=True)
class Correction:
    """Residuals (log of measured over predicted) at the features (`centres`) of measured runs of one regime.
    `amplitude` is the standard deviation of runs from the constants, `noise` that of equal runs from each other;
    `groups` is the number of groups of runs in the regime."""

    regime: str
    amplitude: float
    noise: float
    centres: tuple[tuple[float, ...], ...]
    residuals: tuple[float, ...]
    groups: int
    _solved: list[Any] = field(default_factory=list, repr=False, compare=False)

    def factor(self, features: Sequence[float]) -> float:
        """The factor of a predicted time."""
        weights, _ = self._solution()
        return math.exp(float(_kernel([features], self.centres, self.amplitude)[0] @ weights))

    def spread(self, features: Sequence[float]) -> float:
        """The standard deviation of the factor's logarithm, at least `noise`."""
        _, inverse = self._solution()
        near = _kernel([features], self.centres, self.amplitude)[0]
        return math.sqrt(max(0.0, self.amplitude**2 - float(near @ inverse @ near)) + self.noise**2)

    def width(self, features: Sequence[float]) -> float:
        """`spread` as a share of what it is far from the measured runs; 1 where too few groups were measured to tell
        how near others come."""
        if self.groups < FEWEST_GROUPS:
            return 1.0
        return self.spread(features) / math.hypot(self.amplitude, self.noise)

    def _solution(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._solved:
            import numpy as np

            kernel = _kernel(self.centres, self.centres, self.amplitude)
            inverse = np.linalg.inv(kernel + self.noise**2 * np.eye(len(kernel)))
            self._solved.append((inverse @ np.asarray(self.residuals), inverse))
        weights, inverse = self._solved[0]
        return weights, inverse

    def as_dict(self) -> dict[str, Any]:
        return {
            "regime": self.regime,
            "amplitude": self.amplitude,
            "noise": self.noise,
            "groups": self.groups,
            "features": list(SCALES),
            "centres": [list(centre) for centre in self.centres],
            "residuals": list(self.residuals),
        }


def parse_corrections(tables: Any, where: str) -> dict[str, Correction]:
    """The corrections of a profile's file, by regime. Raises InputError for tables that are no corrections."""
    if not isinstance(tables, list):
        raise InputError(Problem(where, "corrections must be a list of tables", "calibrate again"))
    return {correction.regime: correction for correction in (_parse_correction(table, where) for table in tables)}


def _parse_correction(table: Mapping[str, Any], where: str) -> Correction:
    try:
        points = [tuple(float(x) for x in point) for point in table["points"]]
        centres, residuals = tuple(point[:-1] for point in points), tuple(point[-1] for point in points)
        amplitude, noise = float(table["amplitude"]), float(table["noise"])
        regime, features, groups = str(table["regime"]), list(table["features"]), int(table["groups"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(Problem(where, f"a correction cannot be read ({error})", "calibrate again")) from error
    if features != list(SCALES):
        raise InputError(Problem(where, f"the correction of {regime} has other features", "calibrate again"))
    whole = 0 < len(points) <= MOST_POINTS and all(len(point) == len(SCALES) + 1 for point in points)
    finite = all(math.isfinite(x) for point in points for x in point)
    if not whole or not finite or not 0 < amplitude < 10 or not 0 < noise < 10 or groups < 1:
        raise InputError(Problem(where, f"the correction of {regime} is out of range", "calibrate again"))
    return Correction(regime, amplitude, noise, centres, residuals, groups)


def learn(regime: str, features: Sequence[Sequence[float]], residuals: Sequence[float], groups: int) -> Correction:
    """The correction with the amplitude and noise, out of a small table, that make the residuals likeliest."""
    import numpy as np

    y = np.asarray(residuals, float)
    values, vectors = np.linalg.eigh(_kernel(features, features, 1.0))
    squares = (vectors.T @ y) ** 2

    def unlikelihood(amplitude: float, noise: float) -> float:
        variances = amplitude**2 * np.maximum(values, 0.0) + noise**2
        return float(np.sum(squares / variances + np.log(variances)))

    amplitude, noise = min(product(_AMPLITUDES, _NOISES), key=lambda pair: unlikelihood(*pair))
    centres = tuple(tuple(float(x) for x in row) for row in features)
    return Correction(regime, amplitude, noise, centres, tuple(float(x) for x in y), groups)


_AMPLITUDES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2)
_NOISES = (0.01, 0.014, 0.02, 0.035, 0.06, 0.1)


def _kernel(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], amplitude: float) -> np.ndarray:
    """Covariance of the residuals at features `a` and `b`."""
    import numpy as np

    scales = np.asarray(list(SCALES.values()))
    rows, columns = np.asarray(a, float) / scales, np.asarray(b, float) / scales
    distances = ((rows[:, None, :] - columns[None, :, :]) ** 2).sum(axis=2)
    return amplitude**2 * np.exp(-0.5 * distances)
