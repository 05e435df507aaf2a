"""Profiles: what a file may say, and that what is written is what is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.plan.constants import CONSTANTS
from meshwright.plan.profile import DATASHEET, Profile, constant, default_profile, dump, load_profile

NAMES = [row.name for row in CONSTANTS]


def test_every_constant_says_what_it_is_and_where_it_comes_from() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for row in CONSTANTS:
        assert row.unit and row.what and row.source and row.value > 0 and row.prior >= 0
        assert constant(row.name) is row


@given(st.dictionaries(st.sampled_from(NAMES), st.floats(1e-9, 1e9), max_size=8))
@example({"cuda.overlap.share": 0.99999})
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]) -> None:
    path = tmp_path_factory.mktemp("profiles") / "p.toml"
    profile = DATASHEET.changed(values, name='one "of" mine\\')
    profile.save(path)
    read = load_profile(path)
    assert (read.name, read.intervals) == (profile.name, profile.intervals)
    assert read.constants == pytest.approx(dict(profile.constants), rel=1e-5)


def test_a_constant_left_out_has_its_data_sheets_value(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('name = "few"\n[constants]\n"cuda.product.share" = 0.5\n')
    profile = load_profile(path)
    assert profile["cuda.product.share"] == 0.5
    assert profile["cuda.memory.share"] == DATASHEET["cuda.memory.share"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("constants = 3", "tables"),
        ('[constants]\n"cuda.product.shares" = 1.0', "cuda.product.share"),
        ('[constants]\n"cuda.product.share" = -1.0', "zero or more"),
        ('[constants]\n"cuda.product.share" = 0.0', "is zero"),
        ('[constants]\n"cuda.product.share" = true', "finite number"),
        ('[constants]\n"cuda.product.share" = nan', "finite number"),
        ("[intervals]\nall = [1.2, 1.5]", "low <= 1"),
        ("[intervals]\nall = [0.5]", "low <= 1"),
        ("constans = 1", "unknown key"),
        ("fitted_rows = 'many'", "whole number"),
        ("= nothing", "not TOML"),
    ],
)
def test_a_file_that_is_wrong_is_bad_input(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        load_profile(path)


def test_a_file_that_is_not_there_or_too_large_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such profile"):
        load_profile(tmp_path / "none.toml")
    large = tmp_path / "large.toml"
    large.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(InputError, match="1 MiB"):
        load_profile(large)


def test_the_most_particular_interval_that_is_known_counts() -> None:
    profile = load_intervals({"cuda": (0.8, 1.3), "cuda.nemo": (0.9, 1.1)})
    assert profile.interval("cuda", "nemo", "nodes") == (0.9, 1.1)
    assert profile.interval("cuda", "other") == (0.8, 1.3)
    assert profile.interval("tpu") == profile.intervals["all"]


def load_intervals(extra: dict[str, tuple[float, float]]) -> Profile:

    return replace(DATASHEET, intervals={**DATASHEET.intervals, **extra})


def test_a_change_to_no_constant_is_bad_input() -> None:
    with pytest.raises(InputError, match="unknown constant"):
        DATASHEET.changed({"cuda.magic": 2.0})


def test_the_shipped_profile_knows_every_constant() -> None:
    assert set(default_profile().constants) == set(DATASHEET.constants)
    assert "[constants]" in dump(default_profile())
