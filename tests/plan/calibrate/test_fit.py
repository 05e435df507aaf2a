"""The fit finds known constants, stays at its priors where rows say nothing, and does not follow an odd run."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.plan.calibrate.fit import Prior, balanced_weights, fit, folds, spread_rows


def power_law(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that are a sum of two terms and the larger of it and a floor: smooth nearly everywhere."""
    rng = np.random.default_rng(0)
    return rng.uniform(1, 100, count), rng.uniform(1, 50, count)


def model_of(work: np.ndarray, wires: np.ndarray):  # type: ignore[no-untyped-def]
    def model(values, rows):  # type: ignore[no-untyped-def]
        seconds = work[rows] / values["rate"] + wires[rows] / values["link"]
        return np.log(np.maximum(seconds, values["floor"]) + 0 * values.get("silent", 1.0))

    return model


def test_known_constants_are_found_again() -> None:
    work, wires = power_law()
    true = {"rate": 3.0, "link": 0.7, "floor": 8.0, "silent": 1.0}
    model = model_of(work, wires)
    measured = model(true, np.arange(len(work)))
    priors = [Prior("rate", 1.5, 0.8), Prior("link", 1.0, 0.8), Prior("floor", 14.0, 0.8), Prior("silent", 2.0, 0.5)]
    found = fit(model, measured, np.ones(len(work)), priors)
    for name in ("rate", "link", "floor"):
        assert found.values[name] == pytest.approx(true[name], rel=0.02)
    assert found.values["silent"] == pytest.approx(2.0)
    assert found.loss_after < 0.05 * found.loss_before


def test_a_constant_that_starts_at_its_greatest_value_is_fitted() -> None:
    """A share of a ceiling that is believed to be whole, and is a half; the model cuts what exceeds one."""
    work, wires = power_law()

    def model(values, rows):  # type: ignore[no-untyped-def]
        return np.log(work[rows] / min(1.0, values["share"]) + wires[rows] / values["link"])

    measured = model({"share": 0.5, "link": 0.7}, np.arange(len(work)))
    found = fit(model, measured, np.ones(len(work)), [Prior("share", 1.0, 0.4, 1.0), Prior("link", 0.7, 0.4)])
    assert found.values["share"] == pytest.approx(0.5, rel=0.02)
    assert found.values["link"] == pytest.approx(0.7, rel=0.05)


def test_an_odd_run_does_not_drag_the_rest() -> None:
    work, wires = power_law()
    model = model_of(work, wires)
    true = {"rate": 3.0, "link": 0.7, "floor": 1.0}
    measured = model(true, np.arange(len(work)))
    measured[3] += np.log(5.0)
    found = fit(
        model,
        measured,
        np.ones(len(work)),
        [Prior("rate", 2.0, 0.8), Prior("link", 1.0, 0.8), Prior("floor", 1.0, 0.1)],
    )
    assert found.values["rate"] == pytest.approx(3.0, rel=0.05)
    assert found.values["link"] == pytest.approx(0.7, rel=0.05)


def test_a_narrow_prior_holds_against_one_run() -> None:
    model = model_of(np.array([30.0]), np.array([1.0]))
    measured = np.array([np.log(20.0)])
    found = fit(
        model, measured, np.ones(1), [Prior("rate", 3.0, 0.01), Prior("link", 1.0, 0.01), Prior("floor", 1.0, 0.01)]
    )
    assert found.values["rate"] == pytest.approx(3.0, rel=0.02)


def test_every_source_weighs_the_same_and_no_row_more_than_three() -> None:
    sources = ["a"] * 60 + ["b"] * 20 + ["c"]
    groups = [f"a{i % 4}" for i in range(60)] + [f"b{i}" for i in range(20)] + ["c"]
    weights = balanced_weights(sources, groups)
    assert sum(weights[:60]) == pytest.approx(sum(weights[60:80])) == pytest.approx(27.0)
    assert weights[80] == 3.0


def test_groups_of_one_source_weigh_the_same() -> None:
    weights = balanced_weights(["a"] * 10, ["x"] * 8 + ["y"] * 2, most_of_a_row=10)
    assert sum(weights) == pytest.approx(10)
    assert sum(weights[:8]) == pytest.approx(sum(weights[8:]))


def test_rows_are_spread_over_groups() -> None:
    groups = ["a"] * 50 + ["b"] * 5 + ["c"] * 20
    picked = spread_rows(groups, 12)
    assert picked == sorted(set(picked))
    counts = [sum(groups[i] == name for i in picked) for name in "abc"]
    assert counts == [4, 4, 4]
    assert spread_rows(groups, 500) == list(range(75))


def test_folds_keep_keys_whole_and_are_about_equal() -> None:
    keys = [f"k{i % 13}" for i in range(130)]
    found = folds(keys, 5)
    assert all(len({fold for fold, key in zip(found, keys, strict=True) if key == one}) == 1 for one in set(keys))
    sizes = [found.count(fold) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 10
    assert folds(["a", "b"], 5) == [0, 1]


def test_a_constant_does_not_pass_its_bound() -> None:
    work, wires = power_law()
    model = model_of(work, wires)
    measured = model({"rate": 3.0, "link": 0.7, "floor": 1.0}, np.arange(len(work)))
    priors = [Prior("rate", 1.0, 0.8, most=2.0), Prior("link", 1.0, 0.8), Prior("floor", 1.0, 0.1)]
    found = fit(model, measured, np.ones(len(work)), priors)
    assert found.values["rate"] == pytest.approx(2.0)
