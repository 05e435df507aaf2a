"""A correction fits the measured runs, fades away from them, and states its standard deviation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meshwright.errors import InputError
from meshwright.plan.constants.correction import SCALES, Correction, learn, parse_corrections

WIDTH = len(SCALES)


def points(count: int = 60) -> tuple[list[tuple[float, ...]], list[float]]:
    rng = np.random.default_rng(1)
    places = [tuple(float(x) for x in row) for row in rng.integers(0, 3, (count, WIDTH))]
    return places, [0.1 * math.sin(place[0]) + 0.05 * place[1] for place in places]


def test_it_fits_measured_runs_and_fades_far_away() -> None:
    places, logs = points()
    found = learn("r", places, logs, 9)
    assert [math.log(found.factor(place)) for place in places] == pytest.approx(logs, abs=0.02)
    far = (40.0,) * WIDTH
    assert found.factor(far) == pytest.approx(1.0)
    assert found.spread(far) == pytest.approx(math.hypot(found.amplitude, found.noise))
    assert found.spread(places[0]) < 0.5 * found.spread(far)
    assert (found.width(far), found.width(places[0])) == (
        pytest.approx(1.0),
        found.spread(places[0]) / found.spread(far),
    )
    assert learn("r", places, logs, 8).width(places[0]) == 1.0  # too few groups to tell


def test_it_is_a_gaussian_process_with_that_kernel() -> None:
    """Against scikit-learn's regressor with the same kernel and noise."""
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    kernels = gaussian_process.kernels
    places, logs = points(25)
    found = learn("r", places, logs, 9)
    kernel = kernels.ConstantKernel(found.amplitude**2) * kernels.RBF(list(SCALES.values()))
    twin = gaussian_process.GaussianProcessRegressor(kernel, alpha=found.noise**2, optimizer=None).fit(places, logs)
    there = [tuple(x + 0.4 for x in place) for place in places[:5]]
    means, deviations = twin.predict(there, return_std=True)
    assert [math.log(found.factor(place)) for place in there] == pytest.approx(list(means), abs=1e-8)
    ours = [math.sqrt(found.spread(place) ** 2 - found.noise**2) for place in there]
    assert ours == pytest.approx(list(deviations), abs=1e-6)


def test_noise_alone_teaches_little() -> None:
    rng = np.random.default_rng(2)
    places, _ = points()
    logs = [float(x) for x in rng.normal(0, 0.05, len(places))]
    found = learn("r", places, logs, 9)
    assert max(abs(math.log(found.factor(place))) for place in places) < 0.08


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        3,
        [3],
        [{}],
        [{"regime": "r", "amplitude": 0.1, "noise": 0.1, "groups": 1, "features": [], "points": []}],
        [{"regime": "r", "amplitude": 0, "noise": 0.1, "groups": 1, "features": list(SCALES), "points": []}],
        [{"regime": "r", "amplitude": 0.1, "noise": 0.1, "groups": 1, "features": list(SCALES), "points": [[1.0]]}],
        [
            {
                "regime": "r",
                "amplitude": 0.1,
                "noise": 0.1,
                "groups": 1,
                "features": list(SCALES),
                "points": [[math.nan] * (WIDTH + 1)],
            }
        ],
        [{"regime": "r", "amplitude": 0.1, "noise": 0.1, "features": list(SCALES), "points": [[0.0] * (WIDTH + 1)]}],
        [{"regime": "r", "amplitude": "x", "noise": 0.1, "groups": 1, "features": list(SCALES), "points": []}],
    ],
)
def test_a_file_that_holds_no_correction_is_refused(wrong: object) -> None:
    with pytest.raises(InputError):
        parse_corrections(wrong, "p.toml")


def test_what_is_written_is_read_again() -> None:
    places, logs = points(10)
    found = learn("r", places, logs, 9)
    table = found.as_dict()
    rows = [[*centre, y] for centre, y in zip(table["centres"], table["residuals"], strict=True)]
    again = parse_corrections([{**table, "points": rows}], "p.toml")["r"]
    assert again == Correction("r", found.amplitude, found.noise, found.centres, found.residuals, 9)
