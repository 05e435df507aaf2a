"""Measured or imagined training runs as JSON lines: a strict reader; a bad line does not stop the others.

A case says what runs (model), on what (cluster) and how (train, layout, software). A prediction reads nothing else:
`measured`, `source`, `group` and the like are read by `measured_cases` alone, for fits and scores.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.files import strict_json
from meshwright.plan.cases.consistency import CaseTables, contradictions

LARGEST_LINE_BYTES = 1 << 18
LARGEST_FILE_BYTES = 1 << 30
LONGEST_WORD = 100

SECTIONS = ("model", "cluster", "train", "layout", "software")
#: Keys of a line about its origin. They are allowed, and not read for a prediction.
ABOUT = ("kind", "group", "source", "trust", "note", "measured")


@dataclass(frozen=True)
class ValueKind:
    """The kind of a value ("whole", "number", "flag", "word" or "table"), its bounds, and whether it is required."""

    name: str
    low: float = 1
    high: float = 2**31
    needed: bool = False


_DEGREE = ValueKind("whole", high=2**21)
_RATE = ValueKind("number", low=1e-3, high=1e9)
_FLAG, _WORD = ValueKind("flag"), ValueKind("word")


def _needed(high: float) -> ValueKind:
    return ValueKind("whole", high=high, needed=True)


#: Every key of a case, by section. `name` is allowed and not read.
KEYS: Mapping[str, Mapping[str, ValueKind]] = {
    "model": {
        "layers": _needed(4096),
        "hidden": _needed(2**18),
        "heads": _needed(2**14),
        "kv_heads": ValueKind("whole", high=2**14),
        "head_dim": ValueKind("whole", high=2**14),
        "ffn": _needed(2**21),
        "vocab": _needed(2**24),
        "seq_len": _needed(2**27),
        "gated": _FLAG,
        "tied": _FLAG,
        "params_b": ValueKind("number", low=1e-6, high=1e6),
        "experts": ValueKind("whole", low=0, high=2**16),
        "top_k": ValueKind("whole", low=0, high=2**16),
        "expert_ffn": ValueKind("whole", low=0, high=2**21),
        "shared_ffn": ValueKind("whole", low=0, high=2**21),
        "first_dense_layers": ValueKind("whole", low=0, high=4096),
        "moe_every": ValueKind("whole", high=4096),
        "imbalance": ValueKind("number", low=1.0, high=1e3),
        "q_lora": ValueKind("whole", low=0, high=2**18),
        "kv_lora": ValueKind("whole", low=0, high=2**18),
        "rope_head_dim": ValueKind("whole", low=0, high=2**14),
        "v_head_dim": ValueKind("whole", low=0, high=2**14),
        "mtp_layers": ValueKind("whole", low=0, high=64),
        "sliding_window": ValueKind("whole", high=2**27),
        "name": _WORD,
    },
    "cluster": {
        "device": ValueKind("word", needed=True),
        "devices": _needed(2**21),
        "devices_per_node": ValueKind("whole", high=2**16),
        "figures": ValueKind("table"),
    },
    "figures": {
        "memory_gb": _RATE,
        "memory_gbps": _RATE,
        "tflops": ValueKind("table"),
        "measured_tflops": ValueKind("table"),
        "measured_memory_gbps": _RATE,
        "intra_gbps": _RATE,
        "inter_gbps": _RATE,
        "all_reduce_gbps": _RATE,
        "units": ValueKind("whole", high=2**16),
        "joined": ValueKind("whole", high=2**16),
    },
    "tflops": dict.fromkeys(("fp32", "tf32", "bf16", "fp16", "fp8", "fp4"), _RATE),
    "measured_tflops": dict.fromkeys(("fp32", "tf32", "bf16", "fp16", "fp8", "fp4"), _RATE),
    "train": {"global_batch": _needed(2**31), "precision": _WORD},
    "layout": {
        **dict.fromkeys(("dp", "shard", "optimizer_shard", "tp", "pp", "vpp", "cp", "ep"), _DEGREE),
        "sequence_parallel": _FLAG,
        "micro_batch": ValueKind("whole", high=2**24),
        "recompute": _WORD,
        "schedule": _WORD,
        "offload": _FLAG,
    },
    "software": {
        "framework": _WORD,
        "fused_cross_entropy": _FLAG,
        "activation_offload": _FLAG,
        "compile": _FLAG,
        "async_tp": _FLAG,
    },
}
#: Degrees that a case leaves out.
LAYOUT_DEFAULTS = {"shard": 1, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "micro_batch": 1}


@dataclass(frozen=True)
class Case:
    """One checked line: every value is of its kind, and the figures agree (`consistency`)."""

    id: str
    model: Mapping[str, Any]
    cluster: Mapping[str, Any]
    train: Mapping[str, Any]
    layout: Mapping[str, Any]
    software: Mapping[str, Any]
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadCase:
    """A line that cannot be answered, and why. `id` is None where it could not be read."""

    id: str | None
    problems: tuple[Problem, ...]

    @property
    def error(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)


@dataclass(frozen=True)
class MeasuredCase:
    """A case with its measured figures. Runs of one `group` differ in layout and software only; `source` says who
    measured; `model_key` is equal for runs of one model, also for Llamas with fewer layers."""

    case: Case
    step_seconds: float
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    source: str = ""
    group: str = ""
    model_key: str = field(default="", compare=False)


def read_cases(path: str | Path) -> Iterator[Case | BadCase]:
    """Each line of a file of cases, in order, without empty lines. Raises InputError for a file that is missing or too
    large."""
    for line in _lines(Path(path)):
        yield line if isinstance(line, BadCase) else parse_case(line)


def measured_cases(path: str | Path) -> tuple[list[MeasuredCase], list[BadCase]]:
    """Cases with measured step times, for a fit or a score; and the bad lines."""
    lines = _lines(Path(path))
    cases = [line if isinstance(line, BadCase) else parse_measured_case(line) for line in lines]
    good = [case for case in cases if isinstance(case, MeasuredCase)]
    return good, [case for case in cases if isinstance(case, BadCase)]


def _lines(path: Path) -> Iterator[dict[str, Any] | BadCase]:
    try:
        size = path.stat().st_size
        opened = path.open("rb")
    except OSError as error:
        raise InputError(Problem(str(path), f"cannot be read ({error.strerror})", "name a file of cases")) from error
    with opened as file:
        if size > LARGEST_FILE_BYTES:
            raise InputError(Problem(str(path), f"has {size} bytes", f"split it: at most {LARGEST_FILE_BYTES}"))
        number = 0
        while line := file.readline(LARGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LARGEST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LARGEST_LINE_BYTES)
                problem = Problem(f"line {number}", "is too long for a case", f"at most {LARGEST_LINE_BYTES} bytes")
                yield BadCase(None, (problem,))
            elif line.strip():
                yield parse_line(line, number)


def parse_line(line: bytes, number: int = 1) -> dict[str, Any] | BadCase:
    """The JSON object of a line, or why it cannot be read."""
    where = f"line {number}"
    try:
        value = strict_json(line)
    except RecursionError:
        return BadCase(None, (Problem(where, "is nested too deeply", "a case is an object of six tables"),))
    except ValueError as error:
        return BadCase(None, (Problem(where, f"is not JSON: {str(error)[:LONGEST_WORD]}", "one object per line"),))
    if not isinstance(value, dict):
        return BadCase(None, (Problem(where, f"is {_described(value)}", "a case is a JSON object"),))
    return value


def parse_case(line: Mapping[str, Any]) -> Case | BadCase:
    """The checked case of a line."""
    problems: list[Problem] = []
    name = line.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or len(str(name)[: LONGEST_WORD + 1]) > LONGEST_WORD:
        what = "no id" if name is None else f"{_shown(name)} is no id"
        problems.append(Problem("id", what, f"give a word of at most {LONGEST_WORD} letters"))
        name = None
    keys = ("id", *SECTIONS, *ABOUT)
    problems += [Problem(_cut(key), "unknown key", nearest_name(_cut(key), keys)) for key in line if key not in keys]
    tables = {section: _table(line.get(section, {}), section, problems) for section in SECTIONS}
    if not problems:
        tables["layout"], assumed = _filled_layout(tables)
        problems = contradictions(CaseTables(*(tables[section] for section in SECTIONS[:4])))
    if problems:
        return BadCase(None if name is None else str(name), tuple(problems))
    model = {key: value for key, value in tables["model"].items() if key != "name"}
    return Case(str(name), model, tables["cluster"], tables["train"], tables["layout"], tables["software"], assumed)


def parse_measured_case(line: Mapping[str, Any]) -> MeasuredCase | BadCase:
    """The checked case of a line with its measured figures."""
    case = parse_case(line)
    if isinstance(case, BadCase):
        return case
    measured = line.get("measured")
    seconds = measured.get("step_seconds") if isinstance(measured, Mapping) else None
    if not _is_number(seconds) or not 0 < seconds < 1e9:
        problem = Problem("measured.step_seconds", f"{_shown(seconds)}", "give seconds, above zero and below 1e9")
        return BadCase(case.id, (problem,))
    assert isinstance(measured, Mapping)
    peaks = {}
    for key in ("peak_allocated_gib", "peak_reserved_gib"):
        value = measured.get(key)
        if value is not None and (not _is_number(value) or not 0 < value < 1e7):
            return BadCase(case.id, (Problem(f"measured.{key}", f"{_shown(value)}", "give GiB above zero"),))
        peaks[key] = None if value is None else float(value)
    keys = ["hidden", "heads", "kv_heads", "ffn", "vocab", "experts"]
    if not case.model.get("gated", True):  # GPTs differ in depth; a Llama of another depth is one with fewer layers
        keys.append("layers")
    return MeasuredCase(
        case,
        float(seconds),
        **peaks,
        source=str(line.get("source", "")),
        group=str(line.get("group") or json.dumps([case.model, case.cluster, case.train], sort_keys=True)),
        model_key="-".join(str(case.model.get(key)) for key in keys),
    )


def _table(table: Any, section: str, problems: list[Problem]) -> dict[str, Any]:
    """The valid values of a section; what is wrong with the others is added to `problems`."""
    keys = KEYS[section.rpartition(".")[2]]
    if not isinstance(table, dict):
        problems.append(Problem(section, f"is {_described(table)}", "give a table of keys"))
        return {}
    good: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{section}.{_cut(key)}"
        if key not in keys:
            problems.append(Problem(where, "unknown key", nearest_name(_cut(key), list(keys))))
        elif keys[key].name == "table":
            good[key] = _table(value, where, problems)
        elif value is None and not keys[key].needed:
            continue  # null counts as left out
        elif problem := _wrong(value, keys[key], where):
            problems.append(problem)
        else:
            good[key] = value
    for key, kind in keys.items():
        if kind.needed and key not in table:
            problems.append(Problem(f"{section}.{key}", "is missing", "give it: it has no default"))
    return good


def _wrong(value: Any, kind: ValueKind, where: str) -> Problem | None:
    """What is wrong with a value, and the nearest valid one; None if it is valid."""
    if kind.name == "flag":
        return None if isinstance(value, bool) else Problem(where, f"is {_described(value)}", "give true or false")
    if kind.name == "word":
        if isinstance(value, str) and 0 < len(value) <= LONGEST_WORD:
            return None
        return Problem(where, f"is {_described(value)}", f"give a word of 1 to {LONGEST_WORD} letters")
    if not _is_number(value):
        return Problem(where, f"is {_described(value)}", "give a number")
    low, high = kind.low, kind.high
    if kind.name == "whole" and not isinstance(value, int):
        return Problem(where, f"is {value!r}, which is no whole number", f"nearest: {_clamped(value, kind)}")
    if not low <= value <= high:
        return Problem(where, f"is {_shown(value)}, outside {low:g} to {high:g}", f"nearest: {_clamped(value, kind)}")
    return None


def _clamped(value: float, kind: ValueKind) -> str:
    near = kind.low if value != value or value < kind.low else min(value, kind.high)
    return str(round(near)) if kind.name == "whole" else f"{near:g}"


def _filled_layout(tables: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The layout with its defaults, and what was assumed; a missing `dp` is what the other degrees leave."""
    layout = {**LAYOUT_DEFAULTS, "sequence_parallel": False, "recompute": "none", **tables["layout"]}
    if "dp" in layout:
        return layout, ()
    layout["dp"] = max(1, tables["cluster"]["devices"] // (layout["tp"] * layout["pp"] * layout["cp"]))
    return layout, (f"layout.dp = {layout['dp']}, what the other degrees leave",)


def nearest_word(word: str, meanings: Mapping[str, str], fallback: str) -> tuple[str, bool]:
    """The meaning of a word, and whether it is known exactly; else by what the word contains, else by its spelling."""
    plain = word.strip().lower().replace("-", "_")
    if plain in meanings:
        return meanings[plain], True
    inside = sorted((key for key in meanings if len(key) > 2 and key in plain), key=len)
    if inside:
        return meanings[inside[-1]], False
    close = difflib.get_close_matches(plain, list(meanings), n=1, cutoff=0.5)
    return (meanings[close[0]] if close else fallback), False


def _is_number(value: Any) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


_KINDS = {bool: "a flag", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table"}


def _described(value: Any) -> str:
    return f"{_KINDS[type(value)]} ({_shown(value)})" if type(value) in _KINDS else "null"


def _shown(value: Any) -> str:
    """A value in a message: short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a huge number"
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
