"""Profiles: valid and invalid files, and that a written profile is read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.plan.constants import DATASHEET, Profile, default_profile, load_profile
from meshwright.plan.constants.correction import SCALES, Correction
from meshwright.plan.constants.gpu import CONSTANTS
from meshwright.plan.constants.profile import DEFAULT_FILE, bounds, constant, dump, within

NAMES = [row.name for row in CONSTANTS]


def test_every_constant_says_what_it_is_and_where_it_comes_from() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for row in CONSTANTS:
        assert row.unit and row.what and row.source and row.value > 0 and row.prior >= 0
        assert constant(row.name) is row


@given(st.dictionaries(st.sampled_from(list(DATASHEET.constants)), st.floats(1e-4, 1e4), max_size=8), st.text())
@example({"cuda.overlap.share": 0.99999, "cpu.host.checkpoint_seconds": 1e-4}, 'one "of" mine\\')
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, factors: dict[str, float], name: str
) -> None:
    """Constants anywhere between their bounds, the bounds themselves included."""
    path = tmp_path_factory.mktemp("profiles") / "p.toml"
    values = {constant: within(constant, DATASHEET[constant] * factor) for constant, factor in factors.items()}
    profile = DATASHEET.changed(values, name=name)
    profile.save(path)
    read = load_profile(path)
    assert (read.name, read.intervals) == (profile.name or "p", profile.intervals)
    assert read.constants == pytest.approx(dict(profile.constants), rel=1e-5)


def corrected() -> Profile:
    """A profile with changed constants, intervals and corrections."""
    one = Correction('a "device"/x', 0.1, 0.02, ((1.0,) * len(SCALES),) * 3, (0.1, -0.1, 0.05), 4)
    intervals = {**DATASHEET.intervals, "cuda.a": (3e-6, 1.0)}
    return replace(DATASHEET.changed({"cpu.host.share": 0.5}), intervals=intervals, corrections={one.regime: one})


def test_a_small_interval_is_kept(tmp_path: Path) -> None:
    corrected().save(tmp_path / "p.toml")
    read = load_profile(tmp_path / "p.toml")
    assert read.intervals["cuda.a"] == (3e-6, 1.0) and read.corrections == corrected().corrections


def test_a_file_that_was_cut_off_anywhere_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    corrected().save(path, "Measured (JSON): {}")
    whole = path.read_bytes()
    end = whole.index(b"\n[end]") + len(b"\n[end]")
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut off|not TOML"):
            load_profile(path)
    path.write_bytes(whole[:end])  # only a comment is lost
    assert load_profile(path)["cpu.host.share"] == 0.5


def test_a_saved_file_may_be_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    corrected().save(path)
    path.write_text(path.read_text().replace("[constants]", '# mine\n[constants]\n"cuda.memory.share" = 0.7'))
    assert load_profile(path)["cuda.memory.share"] == 0.7


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    DATASHEET.save(path)
    before = path.read_bytes()
    for bad in (
        DATASHEET.changed({"cuda.product.share": 1e300}),
        replace(DATASHEET, intervals={**DATASHEET.intervals, "cuda": (0.0, 1.2)}),
        replace(DATASHEET, assumed=("x" * (1 << 20),)),
    ):
        with pytest.raises(InputError, match=r"p\.toml"):
            bad.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cuda.product.share", 1e300),
        ("cuda.product.share", 1e-300),
        ("cuda.product.share", 1.01),
        ("cuda.step_seconds", 2.1),
        ("cpu.host.share", 7e-4),
        ("serving.cuda.step_seconds", 10**400),
    ],
)
def test_a_constant_far_off_its_data_sheet_is_bad_input(tmp_path: Path, name: str, value: float) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f'[constants]\n"{name}" = {value!r}\n')
    with pytest.raises(InputError, match=rf"p\.toml: {name} is 1?.*data sheet's value is {DATASHEET[name]:g}; give"):
        load_profile(path)


def test_bounds_hold_the_data_sheet_and_shares_of_a_ceiling_end_at_the_whole() -> None:
    for name, value in DATASHEET.constants.items():
        low, high = bounds(name)
        assert low <= value <= high
    assert bounds("cuda.product.share")[1] == 1.0
    assert bounds("cuda.attention.share")[1] == 1000.0, "of another kernel's speed"
    assert set(default_profile().constants) == set(load_profile(DEFAULT_FILE).constants)


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
        ("[constants]\n[intervals]\nall = [1.2, 1.5]", "low <= 1"),
        ("[constants]\n[intervals]\nall = [0.5]", "low <= 1"),
        (f"[constants]\n[intervals]\nall = [0.5, {10**400}]", "low <= 1"),
        ("constans = 1", "unknown key"),
        ("fitted_rows = 'many'\n[constants]", "whole number"),
        ("= nothing", "not TOML"),
        (f"fitted_rows = {'9' * 5000}\n[constants]", "not TOML"),
        ("", r"no \[constants\]: it is empty or cut off"),
        ("[intervals]\nall = [0.5, 1.5]", r"no \[constants\]"),
        ("closed = true\n[constants]", r"cut off: \[end\] is missing"),
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


def test_the_most_specific_interval_counts() -> None:
    intervals = {**DATASHEET.intervals, "cuda": (0.8, 1.3), "cuda.nemo": (0.9, 1.1)}
    profile = replace(DATASHEET, intervals=intervals)
    assert profile.interval("cuda", "nemo", "nodes") == (0.9, 1.1)
    assert profile.interval("cuda", "other") == (0.8, 1.3)
    assert profile.interval("tpu") == profile.intervals["all"]


def test_a_change_to_no_constant_is_bad_input() -> None:
    with pytest.raises(InputError, match="unknown constant"):
        DATASHEET.changed({"cuda.magic": 2.0})


def test_the_shipped_profile_knows_every_constant() -> None:
    assert set(default_profile().constants) == set(DATASHEET.constants)
    assert "[constants]" in dump(default_profile())
