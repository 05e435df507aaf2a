"""What the constants leave over, learnt from measured runs: a smooth factor near layouts that were measured.

Libraries change algorithm with the size of a message or a product; no constant says so. Where runs of one regime (same
device, framework, precision, recompute and extent) were measured, the logarithm of measured over predicted is
interpolated between them by simple kriging (a Gaussian process with a fixed kernel): exact where many runs agree, and
fading to a factor of 1 away from them. How strong it is decides the likelihood of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem

if TYPE_CHECKING:
    import numpy as np

#: Features, all binary logarithms, and the distance in each over which two runs still tell of each other. What decides
#: algorithms (the split, the micro-batch, the width) is told apart by a doubling; what scales smoothly is not.
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


@dataclass(frozen=True)
class Correction:
    """Residuals (log of measured over predicted) at the features of measured runs of one regime. `amplitude` is how far
    runs stray from the constants, `noise` how far equal runs stray from each other, both as standard deviations."""

    regime: str
    amplitude: float
    noise: float
    centres: tuple[tuple[float, ...], ...]
    residuals: tuple[float, ...]
    _solved: list[Any] = field(default_factory=list, repr=False, compare=False)

    def factor(self, features: Sequence[float]) -> float:
        """What a predicted time is to be multiplied by."""
        weights, _ = self._solution()
        return math.exp(float(_kernel([features], self.centres, self.amplitude)[0] @ weights))

    def spread(self, features: Sequence[float]) -> float:
        """How unsure the factor is there: a standard deviation of its logarithm, at least `noise`."""
        _, inverse = self._solution()
        near = _kernel([features], self.centres, self.amplitude)[0]
        return math.sqrt(max(0.0, self.amplitude**2 - float(near @ inverse @ near)) + self.noise**2)

    def _solution(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._solved:
            import numpy as np

            whole = _kernel(self.centres, self.centres, self.amplitude)
            inverse = np.linalg.inv(whole + self.noise**2 * np.eye(len(whole)))
            self._solved.append((inverse @ np.asarray(self.residuals), inverse))
        weights, inverse = self._solved[0]
        return weights, inverse

    def as_dict(self) -> dict[str, Any]:
        return {
            "regime": self.regime,
            "amplitude": self.amplitude,
            "noise": self.noise,
            "features": list(SCALES),
            "centres": [list(centre) for centre in self.centres],
            "residuals": list(self.residuals),
        }


def parse_corrections(found: Any, where: str) -> dict[str, Correction]:
    """The corrections of a profile's file, by regime. Raises InputError for what is none."""
    if not isinstance(found, list):
        raise InputError(Problem(where, "corrections must be a list of tables", "calibrate again"))
    made = [_parse_correction(one, where) for one in found]
    return {one.regime: one for one in made}


def _parse_correction(found: Mapping[str, Any], where: str) -> Correction:
    try:
        points = [tuple(float(x) for x in point) for point in found["points"]]
        made = Correction(
            str(found["regime"]),
            float(found["amplitude"]),
            float(found["noise"]),
            tuple(point[:-1] for point in points),
            tuple(point[-1] for point in points),
        )
        features = list(found["features"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(Problem(where, f"a correction is not one ({error})", "calibrate again")) from error
    if features != list(SCALES):
        raise InputError(Problem(where, f"the correction of {made.regime} has other features", "calibrate again"))
    whole = 0 < len(points) <= MOST_POINTS and all(len(point) == len(SCALES) + 1 for point in points)
    finite = all(math.isfinite(x) for x in (made.amplitude, made.noise, *(x for point in points for x in point)))
    if not whole or not finite or not 0 < made.amplitude < 10 or not 0 < made.noise < 10:
        raise InputError(Problem(where, f"the correction of {made.regime} is out of range", "calibrate again"))
    return made


def learn(regime: str, features: Sequence[Sequence[float]], residuals: Sequence[float]) -> Correction:
    """The correction whose amplitude and noise make the residuals likeliest, of a small table of both."""
    import numpy as np

    y = np.asarray(residuals, float)
    shape = _kernel(features, features, 1.0)
    values, vectors = np.linalg.eigh(shape)
    turned = (vectors.T @ y) ** 2
    best = min(
        ((_unlikelihood(values, turned, a, n), a, n) for a in _AMPLITUDES for n in _NOISES), key=lambda row: row[0]
    )
    centres = tuple(tuple(float(x) for x in row) for row in features)
    return Correction(regime, best[1], best[2], centres, tuple(float(x) for x in y))


_AMPLITUDES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2)
_NOISES = (0.01, 0.014, 0.02, 0.035, 0.06, 0.1)


def _unlikelihood(values: np.ndarray, turned: np.ndarray, amplitude: float, noise: float) -> float:
    import numpy as np

    variances = amplitude**2 * np.maximum(values, 0.0) + noise**2
    return float(np.sum(turned / variances + np.log(variances)))


def _kernel(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], amplitude: float) -> np.ndarray:
    """Covariance of the residuals at features `a` and `b`."""
    import numpy as np

    scales = np.asarray(list(SCALES.values()))
    left, right = np.asarray(a, float) / scales, np.asarray(b, float) / scales
    apart = ((left[:, None, :] - right[None, :, :]) ** 2).sum(axis=2)
    return amplitude**2 * np.exp(-0.5 * apart)
