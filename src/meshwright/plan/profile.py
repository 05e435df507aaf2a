"""Every constant of the time and memory model, each with its unit and source, and the files they are kept in.

`DATASHEET` holds what data sheets and microbenchmarks say, nothing fitted to step times. A Profile is a set of values
for the same names: fitted by `calibrate`, read from a TOML file, or the one shipped as `default.toml`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.plan.constants import CONSTANTS, Constant
from meshwright.plan.correction import Correction, corrections_of
from meshwright.plan.cpu_constants import CPU_CONSTANTS
from meshwright.plan.serving_constants import SERVING_CONSTANTS, SERVING_INTERVALS

DEFAULT_FILE = Path(__file__).with_name("default.toml")
#: The 90 % interval of a time that nothing was fitted to, as factors of its middle, by regime. That of GPUs held 92 %
#: of 917 published runs (bench/planner.py).
#: "pairs" is the same of the ratio of two layouts' times: 1.39 was found on 5,861 pairs of those runs.
DATASHEET_INTERVALS = {"all": (0.75, 1.4), "cpu": (0.5, 2.0), "pairs": (0.72, 1.39), **SERVING_INTERVALS}
LARGEST_FILE_BYTES = 1 << 20
_ROWS = (*CONSTANTS, *CPU_CONSTANTS, *SERVING_CONSTANTS)
_BY_NAME = {constant.name: constant for constant in _ROWS}


@dataclass(frozen=True)
class Profile:
    """Values of the model's constants by name, and how far its times may be off.

    `intervals` maps a regime, words joined by dots ("cuda.multi"), to the factors (low, high) that bound a 90 %
    interval around a predicted time; "all" is always there, and "pairs" for the ratio of two layouts' times. `assumed`
    is carried to every prediction. `corrections` by regime say what measured runs left over once the constants were
    fitted.
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
        """Factors (low, high) of the regime `words`, the most particular that is known: "a.b.c", then "a.b", "a"."""
        for stop in range(len(words), 0, -1):
            if (found := self.intervals.get(".".join(words[:stop]))) is not None:
                return found
        return self.intervals["all"]

    def changed(self, values: Mapping[str, float], name: str | None = None) -> Profile:
        """This profile with other values for some constants. Raises InputError for a name that is none of them."""
        _check(values, "profile")
        return Profile(
            name or self.name,
            {**self.constants, **values},
            self.intervals,
            self.assumed,
            self.fitted_rows,
            self.corrections,
        )

    def save(self, path: Path) -> None:
        """Write the profile as TOML, constants with their units."""
        path.write_text(dump(self), encoding="utf-8")


DATASHEET = Profile(
    "datasheet",
    {constant.name: constant.value for constant in _ROWS},
    DATASHEET_INTERVALS,
    ("speeds from data sheets: nothing was measured on these devices yet",),
)


def constant(name: str) -> Constant:
    """The row of the table of constants. Raises KeyError for another name."""
    return _BY_NAME[name]


@cache
def default_profile() -> Profile:
    """The profile shipped with the package: one set of constants for every source of measured runs."""
    return load_profile(DEFAULT_FILE) if DEFAULT_FILE.exists() else DATASHEET


def dump(profile: Profile) -> str:
    """A profile as TOML: what `load_profile` reads. Constants and intervals that are as in `DATASHEET` are left out."""
    lines = [f"name = {_text(profile.name)}", f"fitted_rows = {profile.fitted_rows}"]
    lines.append("assumed = [" + ", ".join(_text(word) for word in profile.assumed) + "]")
    lines += ["", "[constants]"]
    for row in _ROWS:
        value = float(f"{profile.constants[row.name]:.6g}")
        if value != float(f"{row.value:.6g}"):
            lines.append(f'"{row.name}" = {value!r}  # {row.unit}; data sheet: {row.value:g}')
    lines += ["", "[intervals]"]
    for regime, (low, high) in sorted(profile.intervals.items()):
        if DATASHEET.intervals.get(regime) != (low, high):
            lines.append(f'"{regime}" = [{low:.4f}, {high:.4f}]')
    for correction in profile.corrections.values():
        lines += ["", "[[corrections]]  # log of measured over predicted at measured runs; fades away from them"]
        found = correction.as_dict()
        lines += [f"regime = {_text(found['regime'])}"]
        lines += [f"{name} = {found[name]!r}" for name in ("amplitude", "noise")]
        lines += [f"features = [{', '.join(map(_text, found['features']))}]"]
        rows = zip(found["centres"], found["residuals"], strict=True)
        lines += ["points = [", *(f"  {[round(x, 4) for x in centre] + [round(y, 5)]}," for centre, y in rows), "]"]
    return "\n".join(lines) + "\n"


def load_profile(path: Path) -> Profile:
    """Read a profile. A constant that the file does not give has its data sheet's value.

    Raises InputError for a file that is missing, too large or no TOML, for unknown keys, and for values out of range.
    """
    where = str(path)
    if not path.is_file():
        raise InputError(Problem(where, "no such profile", "`meshwright calibrate ... --out PROFILE.toml` writes one"))
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise InputError(Problem(where, "a profile is a small file; this one is larger than 1 MiB"))
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(Problem(where, f"not TOML: {error}")) from error
    known = ("name", "fitted_rows", "assumed", "constants", "intervals", "corrections")
    if unknown := [key for key in found if key not in known]:
        raise InputError([Problem(where, f"unknown key '{key}'", nearest_name(key, known)) for key in unknown])
    constants, intervals = found.get("constants", {}), found.get("intervals", {})
    if not isinstance(constants, dict) or not isinstance(intervals, dict):
        raise InputError(Problem(where, "constants and intervals must be tables"))
    _check(constants, where)
    rows, assumed = found.get("fitted_rows", 0), found.get("assumed", [])
    if not isinstance(rows, int) or not isinstance(assumed, list):
        raise InputError(Problem(where, "fitted_rows must be a whole number and assumed a list of words"))
    return Profile(
        name=str(found.get("name", path.stem)),
        constants={**DATASHEET.constants, **{name: float(value) for name, value in constants.items()}},
        intervals={**DATASHEET_INTERVALS, **_intervals(intervals, where)},
        assumed=tuple(str(word) for word in assumed),
        fitted_rows=rows,
        corrections=corrections_of(found.get("corrections", []), where),
    )


def _check(values: Mapping[str, object], where: str) -> None:
    """Every name is a constant's and every value a finite number, above zero where the constant's own is."""
    problems = []
    for name, value in values.items():
        if name not in _BY_NAME:
            problems.append(Problem(where, f"unknown constant '{name}'", nearest_name(name, list(_BY_NAME))))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            problems.append(Problem(where, f"{name} is {value!r}", "give a finite number, zero or more"))
        elif value == 0 and _BY_NAME[name].positive:
            problems.append(Problem(where, f"{name} is zero", f"its data sheet's value is {_BY_NAME[name].value:g}"))
    if problems:
        raise InputError(problems)


def _intervals(found: Mapping[str, object], where: str) -> dict[str, tuple[float, float]]:
    """Factors by regime. Raises InputError where a pair does not bracket 1."""
    pairs = {}
    for regime, pair in found.items():
        numbers = pair if isinstance(pair, list) and len(pair) == 2 else [0, 0]
        if not all(isinstance(n, int | float) for n in numbers) or not 0 < numbers[0] <= 1 <= numbers[1] < math.inf:
            raise InputError(
                Problem(where, f"intervals.{regime} is {pair!r}", "give [low, high] with low <= 1 <= high")
            )
        pairs[regime] = (float(numbers[0]), float(numbers[1]))
    return pairs


def _text(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'
