"""Profiles: values of every constant, with intervals and corrections, and their TOML files.

`DATASHEET` has the values of data sheets and microbenchmarks, not fitted to step times. Other profiles are fitted by
`calibrate` or read from a file; the package ships `default.toml`.
"""

from __future__ import annotations

import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.files import decode_text, toml_value, write_atomic
from meshwright.plan.constants.correction import Correction, parse_corrections
from meshwright.plan.constants.cpu import CPU_CONSTANTS
from meshwright.plan.constants.gpu import CONSTANTS, Constant
from meshwright.plan.constants.serving import SERVING_CONSTANTS, SERVING_INTERVALS

DEFAULT_FILE = Path(__file__).with_name("default.toml")
#: The 90 % intervals of times predicted without a fit, by regime, as factors of the predicted time. That of GPUs held
#: 92 % of 917 published runs (bench/published/planner.py). "pairs" is for the ratio of two layouts' times: 1.39 was
#: found on 5,861 pairs of those runs.
DATASHEET_INTERVALS = {"all": (0.75, 1.4), "cpu": (0.5, 2.0), "pairs": (0.72, 1.39), **SERVING_INTERVALS}
LARGEST_FILE_BYTES = 1 << 20
#: A file's constant further from its data sheet's value than this factor, either way, is a mistake.
FURTHEST = 1000.0
#: Shares of another kernel's speed, not of a ceiling: they may exceed one.
RATIOS = ("cuda.attention.share",)
_ROWS = (*CONSTANTS, *CPU_CONSTANTS, *SERVING_CONSTANTS)
_BY_NAME = {constant.name: constant for constant in _ROWS}


@dataclass(frozen=True)
class Profile:
    """Values of the model's constants by name, and how far its times may be off.

    `intervals` maps a regime, words joined by dots ("cuda.nemo.nodes"), to the factors (low, high) of a predicted time
    that bound its 90 % interval; "all" always exists, and "pairs" for the ratio of two layouts' times. `assumed` is
    added to every prediction. `corrections`, by regime, are the error that fitted constants leave.
    """

    name: str
    constants: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    assumed: tuple[str, ...] = ()
    fitted_rows: int = 0
    corrections: Mapping[str, Correction] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.constants[name]

    def interval(self, *words: str) -> tuple[float, float]:
        """Factors (low, high) of the most specific regime that has an interval: "a.b.c", then "a.b", "a", "all"."""
        for stop in range(len(words), 0, -1):
            if (interval := self.intervals.get(".".join(words[:stop]))) is not None:
                return interval
        return self.intervals["all"]

    def changed(self, values: Mapping[str, float], name: str | None = None) -> Profile:
        """This profile with other values for some constants. Raises InputError for an unknown name."""
        _check(values, "profile")
        return replace(self, name=name or self.name, constants={**self.constants, **values})

    def save(self, path: Path, note: str = "") -> None:
        """Write the profile as TOML, constants with their units, and `note` as a comment, in one atomic step.

        Raises InputError for a profile that `load_profile` would refuse; the old file then stays."""
        data = (dump(self) + (f"\n# {note}\n" if note else "")).encode(errors="replace")
        _parsed(data, path)
        write_atomic(path, data)


DATASHEET = Profile(
    "datasheet",
    {constant.name: constant.value for constant in _ROWS},
    DATASHEET_INTERVALS,
    ("speeds from data sheets: nothing was measured on these devices yet",),
)


def constant(name: str) -> Constant:
    """The constant's row in its table. Raises KeyError for an unknown name."""
    return _BY_NAME[name]


def bounds(name: str) -> tuple[float, float]:
    """The least and the greatest value that a profile's file may give a constant: a factor of FURTHEST from its data
    sheet's value, zero if allowed, and at most one for a share of a ceiling or of work."""
    row = _BY_NAME[name]
    whole = row in CONSTANTS and row.unit == "share" and row.value <= 1 and name not in RATIOS
    least, most = row.value / FURTHEST if row.positive else 0.0, 1.0 if whole else row.value * FURTHEST
    return _rounded(least), _rounded(most)


def within(name: str, value: float) -> float:
    """The value, or the nearest that `bounds` allows."""
    low, high = bounds(name)
    return min(max(value, low), high)


@cache
def default_profile() -> Profile:
    """The profile shipped with the package: one set of constants for every source of measured runs."""
    return load_profile(DEFAULT_FILE) if DEFAULT_FILE.exists() else DATASHEET


def dump(profile: Profile) -> str:
    """A profile as TOML, for `load_profile`. Constants and intervals that equal `DATASHEET`'s are left out."""
    lines = [f"name = {toml_value(profile.name)}", f"fitted_rows = {profile.fitted_rows}"]
    lines += [f"assumed = {toml_value(profile.assumed)}", "closed = true  # by [end]: without it the file was cut off"]
    lines += ["", "[constants]"]
    for row in _ROWS:
        value = _rounded(profile.constants[row.name])
        if value != _rounded(row.value):
            lines.append(f'"{row.name}" = {value!r}  # {row.unit}; data sheet: {row.value:g}')
    lines += ["", "[intervals]"]
    for regime, (low, high) in sorted(profile.intervals.items()):
        if DATASHEET.intervals.get(regime) != (low, high):
            lines.append(f"{toml_value(regime)} = [{low:.5g}, {high:.5g}]")
    for correction in profile.corrections.values():
        lines += ["", "[[corrections]]  # log of measured over predicted at measured runs; fades away from them"]
        table = correction.as_dict()
        lines += [
            f"{name} = {toml_value(table[name])}" for name in ("regime", "amplitude", "noise", "groups", "features")
        ]
        rows = zip(table["centres"], table["residuals"], strict=True)
        lines += ["points = [", *(f"  {[round(x, 4) for x in centre] + [round(y, 5)]}," for centre, y in rows), "]"]
    return "\n".join([*lines, "", "[end]"]) + "\n"


def _rounded(value: float) -> float:
    """A constant as a file has it: six digits."""
    return float(f"{value:.6g}")


def load_profile(path: Path) -> Profile:
    """Read a profile. A constant that is not in the file has its data sheet's value.

    Raises InputError for a file that is missing, too large, cut off or not TOML, and for unknown keys or values out of
    range.
    """
    if not path.is_file():
        what, hint = "no such profile", "`meshwright calibrate ... --out PROFILE.toml` writes one"
        raise InputError(Problem(str(path), what, hint))
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be read ({error.strerror})", "name another profile")) from error
    return _parsed(data, path)


def _parsed(data: bytes, path: Path) -> Profile:
    """The profile in the bytes of a file; a profile without a name is named after `path`."""
    where = str(path)
    if len(data) > LARGEST_FILE_BYTES:
        raise InputError(Problem(where, "a profile is a small file; this one is larger than 1 MiB"))
    try:
        tables = tomllib.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(where, f"not TOML: {error}")) from error
    keys = ("name", "fitted_rows", "assumed", "closed", "constants", "intervals", "corrections", "end")
    if unknown := [key for key in tables if key not in keys]:
        raise InputError([Problem(where, f"unknown key '{key}'", nearest_name(key, keys)) for key in unknown])
    if "constants" not in tables or (tables.get("closed") and "end" not in tables):
        what = "is cut off: [end] is missing" if "constants" in tables else "has no [constants]: it is empty or cut off"
        raise InputError(Problem(where, what, "make it again with `meshwright calibrate`"))
    constants, intervals = tables["constants"], tables.get("intervals", {})
    if not isinstance(constants, dict) or not isinstance(intervals, dict):
        raise InputError(Problem(where, "constants and intervals must be tables"))
    _check(constants, where)
    _check_bounds(constants, where)
    rows, assumed = tables.get("fitted_rows", 0), tables.get("assumed", [])
    if not isinstance(rows, int) or not isinstance(assumed, list):
        raise InputError(Problem(where, "fitted_rows must be a whole number and assumed a list of words"))
    return Profile(
        name=str(tables.get("name", path.stem)),
        constants={**DATASHEET.constants, **{name: float(value) for name, value in constants.items()}},
        intervals={**DATASHEET_INTERVALS, **_intervals(intervals, where)},
        assumed=tuple(str(word) for word in assumed),
        fitted_rows=rows,
        corrections=parse_corrections(tables.get("corrections", []), where),
    )


def _check(values: Mapping[str, object], where: str) -> None:
    """Raises InputError unless every name is a constant's and every value finite, zero only where it is allowed."""
    problems = []
    for name, value in values.items():
        if name not in _BY_NAME:
            problems.append(Problem(where, f"unknown constant '{name}'", nearest_name(name, list(_BY_NAME))))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            problems.append(Problem(where, f"{name} is {value!r}", "give a finite number, zero or more"))
        elif value == 0 and _BY_NAME[name].positive:
            problems.append(Problem(where, f"{name} is zero", f"its data sheet's value is {_BY_NAME[name].value:g}"))
    if problems:
        raise InputError(problems)


def _check_bounds(values: Mapping[str, float], where: str) -> None:
    """Raises InputError unless every value of a file is within its constant's bounds."""
    problems = []
    for name, value in values.items():
        low, high = bounds(name)
        if not low <= value <= high:
            hint = f"its data sheet's value is {_BY_NAME[name].value:g}; give {low:g} to {high:g}"
            problems.append(Problem(where, f"{name} is {value!r:.24}", hint))
    if problems:
        raise InputError(problems)


def _intervals(table: Mapping[str, object], where: str) -> dict[str, tuple[float, float]]:
    """Factors by regime. Raises InputError where a pair does not bracket 1."""
    pairs = {}
    for regime, pair in table.items():
        numbers = pair if isinstance(pair, list) and len(pair) == 2 else [0, 0]
        low, high = numbers if all(isinstance(n, int | float) for n in numbers) else (0, 0)
        if not 0 < low <= 1 <= high <= sys.float_info.max:
            hint = "give [low, high] with low <= 1 <= high"
            raise InputError(Problem(where, f"intervals.{regime} is {pair!r}", hint))
        pairs[regime] = (float(low), float(high))
    return pairs
