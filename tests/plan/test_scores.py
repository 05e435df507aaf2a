"""The scores of bench/published/planner.py: rank correlation as scipy's, regret and quantiles by hand."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from meshwright.layout import Layout

DATA, STAGES = Layout(dp=2), Layout(pp=2)


@pytest.fixture(scope="module")
def planner() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "published" / "planner.py"
    spec = importlib.util.spec_from_file_location("bench_planner", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class FakeRow:
    group: str
    seconds: float
    run: SimpleNamespace
    source: str = "s"


def scored(planner: ModuleType, group: str, layout: Layout, measured: float, mid: float) -> object:
    row = FakeRow(group, measured, SimpleNamespace(layout=layout))
    return planner.RowScore(row, 0.9 * mid, mid, 1.1 * mid)


def test_rank_correlation_is_scipy_s(planner: ModuleType) -> None:
    stats = pytest.importorskip("scipy.stats")
    for a, b in (([1, 2, 3, 4], [4, 3, 2, 1]), ([1, 5, 2, 2, 9], [1, 1, 2, 3, 3]), ([3, 1, 2], [3, 1, 2])):
        assert planner.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_regret_is_what_the_layout_picked_loses(planner: ModuleType) -> None:
    rows = [
        scored(planner, "a", DATA, 1.0, 2.0),
        scored(planner, "a", STAGES, 1.3, 1.0),  # picked, though 30 % slower
        scored(planner, "b", DATA, 1.0, 1.01),  # picked as the simpler of a tie, and best
        scored(planner, "b", STAGES, 2.0, 1.0),
        scored(planner, "c", DATA, 5.0, 5.0),  # nothing to pick from
    ]
    found = planner.regret(rows)
    assert (found["groups"], found["max"]) == (2, pytest.approx(0.3))
    assert found["mean"] == pytest.approx(0.15)
    assert planner.regret(rows[4:]) is None


def test_pairs_predicted_to_differ_are_counted_by_group(planner: ModuleType) -> None:
    rows = [
        scored(planner, "a", DATA, 1.0, 1.0),
        scored(planner, "a", STAGES, 2.0, 1.5),  # predicted to be slower, and is
        scored(planner, "b", DATA, 1.0, 1.5),
        scored(planner, "b", STAGES, 2.0, 1.0),  # predicted to be quicker, and is not
        scored(planner, "c", DATA, 1.0, 1.0),
        scored(planner, "c", STAGES, 2.0, 1.1),  # no order is predicted
        scored(planner, "d", DATA, 1.0, 1.0),  # nothing to compare with
    ]
    assert planner.pair_order(rows, 1.2) == {"factor": 1.2, "told": pytest.approx(2 / 3), "right": pytest.approx(0.5)}


def test_errors_and_coverage(planner: ModuleType) -> None:
    rows = [scored(planner, "a", Layout(dp=i + 1), 1.0, mid) for i, mid in enumerate((1.0, 1.05, 1.2, 0.5))]
    found = planner.summary(rows)
    assert found["mean"] == pytest.approx((0 + 0.05 + 0.2 + 0.5) / 4)
    assert found["p95"] == pytest.approx(0.5)
    assert found["coverage"] == pytest.approx(0.5)
