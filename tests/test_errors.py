"""The error tree: exit codes, messages, the nearest word."""

from __future__ import annotations

import pytest

from meshwright.errors import (
    CannotWork,
    InputError,
    LayoutsDisagree,
    MeshwrightError,
    Problem,
    RunFailed,
    nearest_name,
)


@pytest.mark.parametrize(
    ("kind", "code"), [(InputError, 2), (CannotWork, 3), (RunFailed, 4), (LayoutsDisagree, 5), (MeshwrightError, 4)]
)
def test_exit_codes(kind: type[MeshwrightError], code: int) -> None:
    assert kind("wrong").exit_code == code


def test_a_problem_says_where_what_and_nearest() -> None:
    assert str(Problem("job.toml:3: train.lr", "must be more than 0", "nearest: 1e-3")) == (
        "job.toml:3: train.lr: must be more than 0; nearest: 1e-3"
    )
    assert str(Problem("", "just this")) == "just this"


def test_every_problem_is_in_the_message() -> None:
    error = InputError([Problem("a", "one"), Problem("b", "two")])
    assert str(error) == "a: one\nb: two"
    assert len(error.problems) == 2


def test_text_and_a_single_problem_will_do() -> None:
    assert InputError("plain").problems == (Problem("", "plain"),)
    assert InputError(Problem("a", "one")).problems == (Problem("a", "one"),)


def test_nearest_name() -> None:
    assert nearest_name("stesp", ["steps", "seed"]) == "did you mean 'steps'?"
    assert nearest_name("zzz", ["steps", "seed"]) == "known: seed, steps"
