"""The problems of a Job in plain English: single values (from pydantic's error kinds) and combinations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from meshwright.divisors import nearest_divisor
from meshwright.errors import Problem, nearest_name
from meshwright.files import toml_value
from meshwright.job.file import nearest_file
from meshwright.job.sections import ModelSection
from meshwright.storage.url import is_url, url_fault

#: Keys that hold a path, and the words that are not one.
PATH_KEYS: dict[str, tuple[str, ...]] = {
    "data.source": ("stdlib", "digits"),
    "data.tokenizer": ("bpe", "bytes"),
    "model.hf": (),
    "model.module_folder": (),
    "serve.token_file": (),
}

#: Keys that may hold the URL of a store; the first also a path.
URL_KEYS = ("data.source", "checkpoint.url")

#: An example of each key that must be given.
EXAMPLES: dict[str, str] = {
    "model.layers": "layers = 4",
    "model.hidden": "hidden = 256",
    "model.heads": "heads = 8",
    "model.ffn": "ffn = 688",
    "model.vocab": "vocab = 4096",
    "data.seq_len": "seq_len = 256",
    "train.steps": "steps = 300",
    "train.lr": "lr = 1e-3",
    "train.global_batch": "global_batch = 16",
}

GROUPS = 'for example: groups = [{named = "a100-sxm-80gb", devices = 8}, {named = "h100-sxm-80gb", devices = 8}]'
NAME_A_MODEL = 'add family = "llama", or hf = "path of a Hugging Face folder", or module = "package.file:build"'

Sections = Mapping[str, Mapping[str, Any]]


def plain_problem(entry: Mapping[str, Any], path: list[str], place: str, keys: Mapping[str, str]) -> Problem:
    """One of pydantic's error entries, at `path` in the job, as a Problem in our words."""
    key = _shown_key(path)
    where = f"{place}: {key}" if place else key
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(where, *_unknown(path, keys))
    if kind == "missing":
        if path[1:2] == ["groups"]:
            return Problem(where, "is required", GROUPS)
        if len(path) > 2:
            return Problem(where, "is missing from the list", "give both numbers, as in [0.9, 0.95]")
        return Problem(where, "is required", f"for example: {EXAMPLES[key]}" if key in EXAMPLES else "")
    shown = show(value)
    if path[1:] == ["groups"] and kind in _TYPES:
        return Problem(where, f"must be a list of groups, not {shown}", GROUPS)
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        listed = context["expected"].replace("'", '"').replace("True", "true").replace("False", "false")
        close = nearest_name(value, words) if isinstance(value, str) else ""
        return Problem(where, f"must be {listed}, not {shown}", close if close.startswith("did you mean") else "")
    if kind in _BOUNDS:
        name, phrase = _BOUNDS[kind]
        bound = context[name]
        nearest = "" if kind in ("greater_than", "less_than") else f"nearest: {bound}"
        return Problem(where, f"must be {phrase} {bound}, not {shown}", nearest)
    if kind in _TYPES:
        return Problem(where, f"must be {_TYPES[kind]}, not {shown}", _nearest_of_type(kind, value))
    return Problem(where, f"cannot be {shown}")


_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "string_too_short": "text of at least one character",
    "string_too_long": "a shorter text",
    "dict_type": "a table of keys",
    "model_type": "a section of keys",
    "tuple_type": "a list of two numbers",
    "too_long": "a list of two numbers",
}


def _unknown(path: list[str], keys: Mapping[str, str]) -> tuple[str, str]:
    sections = {key.partition(".")[0] for key in keys}
    name = path[-1]
    homes = [key.partition(".")[0] for key in keys if key.partition(".")[2] == name]
    if homes:
        return "unknown key", "it belongs in " + " or ".join(f"[{home}]" for home in homes)
    if len(path) == 1:
        return "unknown section", nearest_name(name, [*sections, "extends"])
    known = [key.partition(".")[2] for key in keys if key.startswith(path[0] + ".")]
    return "unknown key", nearest_name(name, known)


def _nearest_of_type(kind: str, value: Any) -> str:
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and math.isfinite(value):
        return f"nearest: {show(max(1, round(value)))}"
    number = r"-?\d{1,9}" if kind == "int_type" else r"-?\d{1,9}(\.\d{1,9})?([eE][+-]?\d{1,2})?"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(number, value):
        return f"nearest: {value}, without quotes"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("true", "false"):
        return f"nearest: {value.lower()}, without quotes"
    return ""


def _shown_key(path: list[str]) -> str:
    parts = [part if re.fullmatch(r"[\w-]+", part) else json.dumps(part[:60]) for part in path]
    return ".".join(parts[:2]) + "".join(f"[{part}]" for part in parts[2:])


def show(value: Any) -> str:
    """A value as the user would write it, cut to a readable length."""
    try:
        text = toml_value(value)
    except ValueError:  # no TOML word for it, or a number of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def cross_problems(
    good: Sections, bad: set[str], origin_of: Callable[[str], str], must_exist: Collection[str]
) -> list[Problem]:
    """Problems between keys. `good` has the values that are valid by themselves; `bad` names the other keys;
    `must_exist` the sections, of data and model, whose paths must be there."""

    def problem(key: str, what: str, nearest: str = "") -> Problem:
        place = origin_of(key)
        return Problem(f"{place}: {key}" if place else key, what, nearest)

    about_model = (_model_problems, _shape_problems, _module_problems)
    checks = (*about_model, _task_problems, _length_problems, _group_problems, _launch_problems)
    between_keys = [entry for check in checks for entry in check(good, bad)]
    return [problem(*entry) for entry in (*between_keys, *_url_problems(good), *_path_problems(good, must_exist))]


KeyProblems = Iterator[tuple[str, str, str]]

#: Keys of [model] that are not a family's shape.
NOT_SHAPE = ("family", "hf", "module", "module_folder", "arguments")
_SHAPE_DEFAULTS = {key: field.default for key, field in ModelSection.model_fields.items() if key not in NOT_SHAPE}


def _model_problems(good: Sections, bad: set[str]) -> KeyProblems:
    model = good.get("model", {})
    named = [key for key in ("family", "hf", "module") if model.get(key) is not None]
    if not named and not bad & {"model", "model.family", "model.hf", "model.module"}:
        yield "model", "names no model", NAME_A_MODEL
    if len(named) > 1:
        yield f"model.{named[-1]}", f"names a second model beside {named[0]}", f"keep {' or '.join(named)}, not both"
    if len(named) == 1 and named[0] != "family":
        for key, default in _SHAPE_DEFAULTS.items():
            if model.get(key, default) != default:
                home = "the folder's config.json" if named[0] == "hf" else "the module: give it to `arguments`"
                yield f"model.{key}", f"is not used with {named[0]}; it comes from {home}", "leave it out"
    if named == ["family"]:
        for key in ("layers", "hidden", "heads", "ffn", "vocab"):
            if model.get(key) is None and f"model.{key}" not in bad:
                yield f"model.{key}", "is required with family", f"for example: {EXAMPLES[f'model.{key}']}"
    for key in ("arguments", "module_folder"):
        if model.get(key) and "module" not in named and "model.module" not in bad:
            yield f"model.{key}", "is for `module` only", "leave it out"


def _shape_problems(good: Sections, bad: set[str]) -> KeyProblems:
    model = good.get("model", {})
    hidden, heads, kv_heads = model.get("hidden"), model.get("heads"), model.get("kv_heads")
    head_dim = model.get("head_dim")
    if hidden and heads and head_dim is None and "model.head_dim" not in bad:
        near = nearest_divisor(hidden, heads)
        yield "model.heads", f"{heads} does not divide hidden = {hidden}", f"nearest: {near}, or give head_dim"
    if head_dim is not None and head_dim % 2:
        yield "model.head_dim", f"must be even for rotary positions, not {head_dim}", f"nearest: {head_dim + 1}"
    if heads and kv_heads and heads % kv_heads:
        near = nearest_divisor(heads, kv_heads)
        yield "model.kv_heads", f"{kv_heads} does not divide heads = {heads}", f"nearest: {near}"


def _module_problems(good: Sections, bad: set[str]) -> KeyProblems:
    model = good.get("model", {})
    module = model.get("module")
    if module is not None and not re.fullmatch(r"([^:\0]+\.py|[^\W\d]\w*(\.[^\W\d]\w*)*):[^\W\d]\w*", module):
        yield "model.module", f"is not package.file:function, but {show(module)}", 'for example: "mypackage.net:build"'
    for key in ("arguments", "rope_scaling"):
        if not _is_plain(model.get(key) or {}):
            yield f"model.{key}", "may hold only text, numbers, true, false, lists and tables", "64-bit numbers at most"


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > 16:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one, depth + 1) for key, one in value.items())
    if isinstance(value, list):
        return all(_is_plain(one, depth + 1) for one in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _task_problems(good: Sections, bad: set[str]) -> KeyProblems:
    data, name = good.get("data", {}), good.get("task", {}).get("name", "language-model")
    if bad & {"task", "task.name", "data", "data.source", "data.seq_len"}:
        return
    if name == "language-model" and data.get("seq_len") is None:
        yield "data.seq_len", "is required for a language model", f"for example: {EXAMPLES['data.seq_len']}"
    if name == "language-model" and data.get("source") == "digits":
        yield "data.source", "digits are images, not text", 'nearest: "stdlib", or task.name = "classification"'
    if name == "classification" and data.get("source", "stdlib") == "stdlib":
        yield "data.source", "stdlib is text, without classes", 'nearest: "digits", or task.name = "language-model"'
    if name == "classification" and good.get("model", {}).get("module") is None and "model.module" not in bad:
        yield "task.name", "classification needs model.module", 'nearest: "language-model"'


def _length_problems(good: Sections, bad: set[str]) -> KeyProblems:
    train = good.get("train", {})
    steps, warmup = train.get("steps"), train.get("warmup_steps")
    if steps is not None and warmup is not None and warmup > steps:
        yield "train.warmup_steps", f"{warmup} is more than steps = {steps}", f"nearest: {steps}"


def _group_problems(good: Sections, bad: set[str]) -> KeyProblems:
    cluster = good.get("cluster", {})
    groups = cluster.get("groups")
    if not groups:
        return
    for key in ("named", "devices", "devices_per_node", "dollars_per_hour"):
        if cluster.get(key) is not None:
            yield f"cluster.{key}", "is given by each of cluster.groups", "leave it out"
    if len(groups) == 1:
        yield "cluster.groups", "is one group", "one kind of device is cluster.named and cluster.devices"


def _launch_problems(good: Sections, bad: set[str]) -> KeyProblems:
    least, devices = good.get("launch", {}).get("devices_min"), good.get("cluster", {}).get("devices")
    if least is not None and devices is not None and least > devices:
        yield "launch.devices_min", f"is {least}, more than cluster.devices = {devices}", f"nearest: {devices}"


def _url_problems(good: Sections) -> KeyProblems:
    for key in (*URL_KEYS, *(key for key in PATH_KEYS if key not in URL_KEYS)):
        section, _, name = key.partition(".")
        value = good.get(section, {}).get(name)
        if value is None or (not is_url(value) and key != "checkpoint.url"):
            continue
        if key not in URL_KEYS:
            yield key, "is a URL where a path is needed", "copy it to this machine, and name that"
        elif fault := url_fault(value):
            yield key, *fault


def _path_problems(good: Sections, must_exist: Collection[str]) -> KeyProblems:
    for key, words in PATH_KEYS.items():
        section, _, name = key.partition(".")
        value = good.get(section, {}).get(name)
        if value is None or value in words or key == "serve.token_file" or is_url(value):
            continue
        if "\0" in value:
            yield key, "is not a path", ""
        elif section not in must_exist:
            continue
        elif section == "model":
            if not Path(value).is_dir():
                yield key, f"no folder {show(value)}", nearest_file(Path(value))
            elif key == "model.hf" and not (Path(value) / "config.json").is_file():
                yield key, f"{show(value)} is no Hugging Face folder: it has no config.json", nearest_file(Path(value))
        elif not Path(value).exists():
            close = nearest_name(Path(value).name, words)
            hint = close if close.startswith("did you mean") else nearest_file(Path(value))
            yield key, f"no file or folder {show(value)}", hint
