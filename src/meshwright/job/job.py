"""The Job: what one job file says.

`load_job(path, overrides)` reads a file; `Job(model={...}, data={...}, train={...})` is the same in Python. Both list
every problem at once as an InputError. Derived values (head_dim, kv_heads, warm-up, task) are filled in here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PrivateAttr, ValidationError

from meshwright.errors import InputError, Problem
from meshwright.files import toml_text
from meshwright.job.checks import NOT_SHAPE, cross_problems, plain_problem
from meshwright.job.defaults import absolute_paths, with_defaults
from meshwright.job.file import COMMAND_LINE, read_overrides, read_values
from meshwright.job.sections import JobSections, ServeSection

SMALL_JOB = """\
# A small Llama-style language model, trained on the sources of Python's standard library: no file is needed.
#   meshwright check job.toml     reads it, and the data       meshwright plan job.toml   shows how it would be split
#   meshwright train job.toml     trains it on this machine    train.steps=20             after any verb changes a value

[model]
family = "llama"        # Llama, Mistral, Qwen2 and Qwen3 shapes; or hf = "folder", or module = "package.file:build"
layers = 4
hidden = 192            # width of the residual stream
heads = 6               # query heads; head_dim is hidden / heads
kv_heads = 2            # key and value heads, shared by groups of query heads
ffn = 512               # width of the feed-forward part
vocab = 2048            # tokens in the vocabulary

[data]
source = "stdlib"       # or "digits", or the path of a .txt or .jsonl file or of a folder of text
seq_len = 256           # tokens per sequence
tokenizer = "bpe"       # trained on the source; or "bytes", or the path of a tokenizer.json

[train]
steps = 300
lr = 3e-3
global_batch = 16       # sequences per step, over all devices
"""


class Job(JobSections):
    """A complete, checked, frozen job. `origins` says where each value came from.

    Raises InputError listing every wrong section, key, type, range and combination. Relative paths start from the
    folder of the file that has them (from the current folder in Python and on the command line).
    """

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        *,
        origins: dict[str, str] | None = None,
        data_must_exist: bool = True,
        model_must_exist: bool = True,
        **sections: Any,
    ) -> None:
        if origins is None:
            origins = dict.fromkeys(_dotted_keys(sections), "Python")
            sections = absolute_paths(sections, {})
        present = {"data": data_must_exist, "model": model_must_exist}
        resolved = _resolve(sections, origins, [section for section, must in present.items() if must])
        super().__init__(**resolved)
        for section in type(self).model_fields:
            for key in type(getattr(self, section)).model_fields:
                self._origins[f"{section}.{key}"] = origins.get(f"{section}.{key}", "default")

    def __eq__(self, other: object) -> bool:
        """Whether all values are equal, whatever their origins."""
        return isinstance(other, Job) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(job_to_toml(self))

    @property
    def origins(self) -> dict[str, str]:
        """ "section.key" -> "job.toml:12", "command line", "Python" or "default"."""
        return dict(self._origins)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Every value by section and key, as plain dicts, lists, numbers, text and None."""
        return self.model_dump(mode="json")


def load_job(
    path: str | Path, overrides: Sequence[str] = (), *, data_must_exist: bool = True, model_must_exist: bool = True
) -> Job:
    """The Job of the file at `path` with `section.key=value` overrides on top.

    Planning needs no data: `data_must_exist=False`. What a run was begun with may lie elsewhere by now:
    `model_must_exist=False`, too. Raises InputError listing every problem.
    """
    values = read_values(Path(path), overrides)
    sections = absolute_paths(values.sections, values.folders)
    try:
        present = {"data_must_exist": data_must_exist, "model_must_exist": model_must_exist}
        job = Job(origins=values.origins, **present, **sections)
    except InputError as error:
        raise InputError([*values.problems, *error.problems]) from None
    if values.problems:
        raise InputError(values.problems)
    return job


def valid_part(path: str | Path, overrides: Sequence[str] = ()) -> Job | None:
    """A faulty job without its faulty values, so that the plan's problems can be listed beside the job's own.

    None if too little remains, or if a faulty value would change the plan.
    """
    values = read_values(Path(path), overrides)
    sections = absolute_paths(values.sections, values.folders)
    _, problems, good = _examine(sections, values.origins)
    if values.problems or {key.partition(".")[0] for key in problems} & {"layout", "cluster"}:
        return None
    good["train"] = {"steps": 1, "lr": 1.0, **good.get("train", {})}  # neither changes what fits
    try:
        return Job(origins=values.origins, data_must_exist=False, model_must_exist=True, **good)
    except InputError:
        return None


def read_serve(overrides: Sequence[str], run_job: Path) -> ServeSection:
    """The [serve] section of the run's job file, if there is one, with `serve.key=value` overrides on top."""
    values = read_overrides(overrides)
    problems = values.problems + [
        Problem(f"{COMMAND_LINE}: {section}", "only settings of [serve] can be given here", "serve.key=value")
        for section in values.sections
        if section != "serve"
    ]
    from_job = {}
    if run_job.is_file():
        from_job = load_job(run_job, data_must_exist=False, model_must_exist=False).as_dict()["serve"]
    overriding = absolute_paths(values.sections, values.folders).get("serve", {})
    try:
        settings = ServeSection(**{**from_job, **overriding})
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            path = ["serve", *(str(part) for part in entry["loc"])]
            problems.append(plain_problem(entry, path, COMMAND_LINE, job_keys()))
    if problems:
        raise InputError(problems)
    return settings


def job_to_toml(job: Job) -> str:
    """The resolved job as TOML that `load_job` reads back to an equal Job."""
    return sections_to_toml(job.as_dict())


def sections_to_toml(sections: dict[str, dict[str, Any]]) -> str:
    """`job_to_toml` of a Job's `as_dict`, as a checkpoint has it."""
    model = sections["model"]
    if model["family"] is None:  # the rest of [model] is the shape of a family
        model = {key: model[key] for key in NOT_SHAPE}
    return toml_text({**sections, "model": model})


def json_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors. No key is required, since the file that it `extends` may have it."""
    schema = Job.model_json_schema()
    for table in (schema, *schema["$defs"].values()):
        table.pop("required", None)
    extends = {"type": "string", "title": "Extends", "description": "another job file, relative to this one"}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Meshwright job"}


def job_keys() -> dict[str, str]:
    """ "section.key" -> its meaning, in the order of the file."""
    sections = {name: field.annotation for name, field in Job.model_fields.items()}
    return {
        f"{section}.{key}": field.description or ""
        for section, kind in sections.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for key, field in kind.model_fields.items()
    }


def _dotted_keys(sections: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}" for section, content in sections.items() if isinstance(content, dict) for key in content]


def _resolve(sections: dict[str, Any], origins: dict[str, str], must_exist: Collection[str]) -> dict[str, Any]:
    """The sections with derived values. Raises InputError listing every problem."""
    resolved, problems, good = _examine(sections, origins)
    crossed = cross_problems(good, {_key_of(path) for path in problems}, _origin_lookup(origins), must_exist)
    if problems or crossed:
        raise InputError([*problems.values(), *crossed])
    return resolved


def _examine(
    sections: dict[str, Any], origins: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Problem], dict[str, dict[str, Any]]]:
    """The sections with derived values, the problems of single values by path, and the valid values."""
    sections = {"train": {}, **with_defaults(sections)}
    keys = job_keys()
    problems: dict[str, Problem] = {}
    try:
        JobSections.model_validate(sections)
    except ValidationError as error:
        for entry in error.errors(include_url=False, include_context=True):
            path = [str(part) for part in entry["loc"]]
            place = _origin_lookup(origins)(".".join(path[:2]))
            problems.setdefault(".".join(path), plain_problem(entry, path, place, keys))
    bad = {_key_of(path) for path in problems}
    good = {
        section: {key: value for key, value in content.items() if f"{section}.{key}" not in bad}
        for section, content in sections.items()
        if isinstance(content, dict) and section not in bad
    }
    return sections, problems, good


def _key_of(path: str) -> str:
    return ".".join(path.split(".")[:2])


def _origin_lookup(origins: dict[str, str]) -> Callable[[str], str]:
    """Key -> its origin, or its section's where it has none."""
    return lambda key: origins.get(key, origins.get(key.split(".")[0], ""))
