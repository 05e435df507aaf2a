"""Every layout computes what one device does: 20 steps of AdamW in fp32, loss and gradients within 1e-5.

The batches hold padding, spread unevenly over samples, so that a rank's share of the counted tokens is not its share
of the samples. Model sizes do not divide evenly over shards.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from meshwright.launch import Context
from meshwright.layout import Layout
from tests.worlds import Case, Distance, Trained, compare, train_cases, train_one

pytestmark = pytest.mark.timeout(600)  # the first test of a file trains all the layouts

TOLERANCE = 1e-5

#: What splits the work, each over two processes, in two micro-batches or more.
WAYS = {
    "replicated": {"dp": 2, "micro_batch": 2},
    "sharded": {"dp": 2, "shard": 2, "micro_batch": 2},
    "tensor": {"tp": 2, "micro_batch": 4},
    "tensor and sequence": {"tp": 2, "sequence_parallel": True, "micro_batch": 4},
    "gpipe": {"pp": 2, "schedule": "gpipe", "micro_batch": 2},
    "1f1b": {"pp": 2, "schedule": "1f1b", "micro_batch": 2},
}
RECOMPUTE = ("none", "selective", "full")

ALONE_ON_FOUR = (
    Layout(dp=4, micro_batch=2),
    Layout(dp=4, shard=4),
    Layout(dp=4, shard=2),
    Layout(tp=4, micro_batch=8),
    Layout(tp=4, sequence_parallel=True, micro_batch=8),
    Layout(pp=4, schedule="gpipe", micro_batch=2),
    Layout(pp=4, schedule="1f1b"),
)


def pairs() -> list[Layout]:
    """Every two ways that can be together, on four processes. Each way meets selective and full recompute."""
    together = [
        {**first, **second, "micro_batch": 2}
        for first, second in itertools.combinations(WAYS.values(), 2)
        if not {"dp", "tp", "pp"} & set(first) & set(second)
    ]
    return [
        Layout(**way, recompute=recompute) for way, recompute in zip(together, itertools.cycle(RECOMPUTE), strict=False)
    ]


CASES = [
    *(Case(Layout(recompute=recompute, micro_batch=4)) for recompute in RECOMPUTE[1:]),
    *(Case(Layout(**way)) for way in WAYS.values()),
    *(Case(layout, "fourfold" if layout.tp == 4 else "plain") for layout in ALONE_ON_FOUR),
    *(Case(layout) for layout in pairs()),
    # The features of the other families, where they meet a split.
    Case(Layout(dp=2, shard=2, micro_batch=2), "tied"),
    Case(Layout(tp=2, sequence_parallel=True, micro_batch=4), "tied"),
    Case(Layout(pp=2, micro_batch=2), "tied"),
    Case(Layout(tp=2, sequence_parallel=True, recompute="full", micro_batch=4), "biased"),
    Case(Layout(dp=2, shard=2, pp=2, micro_batch=2), "tied"),
    Case(Layout(tp=2, pp=2, sequence_parallel=True, micro_batch=4), "tied"),
]

#: Needs eight processes.
EIGHT = [
    Case(Layout(pp=2, tp=2, dp=2, shard=2)),
    Case(Layout(pp=2, tp=2, dp=2, shard=2, sequence_parallel=True, recompute="selective", schedule="gpipe"), "tied"),
    Case(Layout(dp=4, shard=2, tp=2)),
    Case(Layout(dp=4, shard=2, pp=2)),
]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """By shape: the reference, trained in this process."""
    root = tmp_path_factory.mktemp("one-device")
    shapes = {case.shape: case.alone for case in [*CASES, *EIGHT]}
    return {shape: train_one(case, Context.alone(), root / shape) for shape, case in shapes.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return train_cases(CASES, tmp_path_factory.mktemp("layouts"))


def _agrees(found: Distance, tolerance: float = TOLERANCE) -> None:
    assert found.loss <= tolerance, f"loss differs by {found.loss:.1e}"
    assert found.norm <= tolerance, f"gradient norm differs by {found.norm:.1e}"
    assert found.gradient <= tolerance, f"{found.gradient_where} differs by {found.gradient:.1e}"
    assert found.first_gradient <= tolerance, f"{found.first_where} differs by {found.first_gradient:.1e} at step 1"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_device(case: Case, one_device: dict[str, Trained], trained: dict[str, Trained]) -> None:
    _agrees(compare(one_device[case.shape], trained[case.name]))


def test_the_cases_are_different_and_the_losses_fall(trained: dict[str, Trained]) -> None:
    assert len({case.name for case in CASES}) == len(CASES) == len(trained)
    for each in trained.values():
        assert len(each.losses) == 20 and len(set(each.losses)) == 20


@pytest.mark.slow
def test_each_way_with_each_recompute_equals_one_device(one_device: dict[str, Trained], tmp_path: Path) -> None:
    cases = [
        Case(Layout(**way, recompute=recompute)) for way, recompute in itertools.product(WAYS.values(), RECOMPUTE[1:])
    ]
    trained = train_cases(cases, tmp_path)
    for case in cases:
        _agrees(compare(one_device["plain"], trained[case.name]))


@pytest.mark.slow
def test_layouts_of_eight_processes_equal_one_device(one_device: dict[str, Trained], tmp_path: Path) -> None:
    trained = train_cases(EIGHT, tmp_path)
    for case in EIGHT:
        _agrees(compare(one_device[case.shape], trained[case.name]))


@pytest.mark.slow
def test_bf16_stays_near_fp32(one_device: dict[str, Trained], tmp_path: Path) -> None:
    cases = [
        Case(layout, precision="bf16")
        for layout in (Layout(), Layout(dp=2, shard=2), Layout(tp=2, sequence_parallel=True), Layout(pp=2))
    ]
    for each in train_cases(cases, tmp_path).values():
        apart = [abs(a - b) / b for a, b in zip(each.losses, one_device["plain"].losses, strict=True)]
        assert 0 < max(apart) < 5e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_layouts_equal_one_device(one_device: dict[str, Trained], tmp_path: Path) -> None:
    layouts = (Layout(dp=2, shard=2), Layout(tp=2, sequence_parallel=True), Layout(pp=2, recompute="selective"))
    cases = [Case(layout, compiled=True) for layout in layouts]
    trained = train_cases(cases, tmp_path, seconds=580)
    for case in cases:
        _agrees(compare(one_device["plain"], trained[case.name]))
