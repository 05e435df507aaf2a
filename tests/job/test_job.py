"""The job file: what it says, what is wrong with it, where it came from, and back to TOML."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.files import toml_text
from meshwright.job import SMALL_JOB, Job, job_keys, job_to_toml, json_schema, load_job, read_serve
from meshwright.job.file import key_lines, parse_value

MODEL = {"family": "llama", "layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "vocab": 300}
TRAIN = {"steps": 10, "lr": 1e-3, "global_batch": 4}


def job(**changes: dict[str, Any]) -> Job:
    sections = {"model": MODEL, "data": {"seq_len": 16}, "train": TRAIN}
    return Job(**{**sections, **{name: {**sections.get(name, {}), **content} for name, content in changes.items()}})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(SMALL_JOB)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_job(path, overrides)
    return [str(problem) for problem in caught.value.problems]


def python_problems(**changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        job(**changes)
    return str(caught.value)


def test_the_small_job_is_complete(small: Path) -> None:
    loaded = load_job(small)
    assert loaded.model.family == "llama"
    assert loaded.layout.pins() == {}
    assert loaded.data.source == "stdlib"


def test_what_follows_is_filled_in() -> None:
    made = job()
    assert made.model.kv_heads == 4
    assert made.model.head_dim == 8
    assert made.train.warmup_steps == 1
    assert made.task.name == "language-model"
    assert job(train={"steps": 5000}).train.warmup_steps == 100
    made = Job(model={"module": "net:build"}, data={"source": "digits"}, train=TRAIN)
    assert made.task.name == "classification"


def test_what_is_said_is_kept() -> None:
    made = job(model={"kv_heads": 2, "head_dim": 16}, train={"warmup_steps": 0})
    assert (made.model.kv_heads, made.model.head_dim, made.train.warmup_steps) == (2, 16, 0)


def test_a_job_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        job().train.steps = 3  # type: ignore[misc]


def test_the_file_and_python_say_the_same(small: Path) -> None:
    assert Job(**tomllib.loads(SMALL_JOB)) == load_job(small)
    assert hash(Job(**tomllib.loads(SMALL_JOB))) == hash(load_job(small))


def test_overrides_and_origins(small: Path) -> None:
    loaded = load_job(small, ["train.lr=5e-4", "train.decay=wsd", "layout.tp=2", "train.betas=[0.8, 0.9]"])
    assert (loaded.train.lr, loaded.train.decay, loaded.layout.tp, loaded.train.betas) == (5e-4, "wsd", 2, (0.8, 0.9))
    assert loaded.origins["train.lr"] == "command line"
    assert loaded.origins["train.clip"] == "default"
    line = SMALL_JOB.splitlines().index("steps = 300") + 1
    assert loaded.origins["train.steps"] == f"{small}:{line}"
    assert set(loaded.origins) == set(job_keys())


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("3.5", 3.5), ("true", True), ("cosine", "cosine"), ('"3"', "3"), ("[1, 2]", [1, 2]), ("", "")],
)
def test_override_values_are_toml_or_bare_strings(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_an_override_cannot_smuggle_in_another_key() -> None:
    assert parse_value("1\nother = 2") == "1\nother = 2"


def test_extends(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base, child = tmp_path / "base.toml", tmp_path / "sub" / "child.toml"
    base.write_text(SMALL_JOB)
    child.write_text('extends = "../base.toml"\n[train]\nlr = 0.5\n')
    loaded = load_job(child)
    assert (loaded.train.lr, loaded.train.steps) == (0.5, 300)
    assert loaded.origins["train.lr"] == f"{child}:3"
    assert loaded.origins["train.steps"].startswith(str(child.parent / "../base.toml:"))


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    assert "circle: a.toml -> b.toml -> a.toml" in problems(tmp_path / "a.toml")[0]


def test_a_missing_base_is_named_with_the_nearest(tmp_path: Path, small: Path) -> None:
    (tmp_path / "child.toml").write_text('extends = "jobb.toml"')
    assert problems(tmp_path / "child.toml") == [
        f"{tmp_path / 'child.toml'}:1: extends: no file 'jobb.toml'; did you mean 'job.toml'?"
    ]


def test_all_problems_at_once(small: Path) -> None:
    found = "\n".join(
        problems(
            small,
            "train.stpes=3",
            "train.lr=fast",
            "train.seed=-1",
            "model.kv_heads=4",
            "data.source=nowhere.txt",
            "layuot.tp=2",
            "train.decay=cosin",
            "train",
        )
    )
    assert "command line: train: is not section.key=value" in found
    assert "train.stpes: unknown key; did you mean 'steps'?" in found
    assert 'train.lr: must be a number, not "fast"' in found
    assert "train.seed: must be at least 0, not -1; nearest: 0" in found
    assert "model.kv_heads: 4 does not divide heads = 6; nearest: 3" in found
    assert "data.source: no file or folder" in found
    assert "layuot: unknown section; did you mean 'layout'?" in found
    assert "did you mean 'cosine'?" in found
    assert len(found.splitlines()) == 8


def test_problems_name_file_and_line(small: Path) -> None:
    small.write_text(SMALL_JOB.replace("steps = 300", 'steps = "300"'))
    line = SMALL_JOB.splitlines().index("steps = 300") + 1
    assert problems(small) == [
        f'{small}:{line}: train.steps: must be a whole number, not "300"; nearest: 300, without quotes'
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"steps": 1.5}}, "train.steps: must be a whole number, not 1.5; nearest: 2"),
        ({"train": {"steps": True}}, "train.steps: must be a whole number, not true"),
        ({"train": {"lr": 0}}, "train.lr: must be more than 0"),
        ({"train": {"lr": float("nan")}}, "train.lr: must be"),
        ({"train": {"lr": float("inf")}}, "train.lr: must be"),
        ({"train": {"betas": [0.9]}}, "train.betas[1]: is missing from the list"),
        ({"train": {"betas": 0.9}}, "train.betas: must be a list of two numbers, not 0.9"),
        ({"train": {"compile": 1}}, 'train.compile: must be "auto", true or false, not 1'),
        ({"train": {"precision": "fp16"}}, "train.precision: must be"),
        ({"train": {"warmup_steps": 11}}, "train.warmup_steps: 11 is more than steps = 10; nearest: 10"),
        ({"model": {"heads": 5}}, "model.heads: 5 does not divide hidden = 32; nearest: 4, or give head_dim"),
        ({"model": {"kv_heads": 3}}, "model.kv_heads: 3 does not divide heads = 4"),
        ({"model": {"head_dim": 7}}, "model.head_dim: must be even"),
        ({"model": {"lr": 1.0}}, "model.lr: unknown key; it belongs in [train]"),
        ({"model": {"hf": "/"}}, "model.hf: names a second model beside family"),
        ({"model": {"module": "a:b"}}, "model.module: names a second model beside family"),
        ({"model": {"arguments": {"width": 1}}}, "model.arguments: is for `module` only"),
        ({"model": {"rope_scaling": {"when": object()}}}, "model.rope_scaling: may hold only"),
        ({"serve": {"http_port": 70000}}, "serve.http_port: must be at most 65535, not 70000; nearest: 65535"),
        ({"layout": {"schedule": "zb"}}, 'layout.schedule: must be "gpipe", "1f1b", "interleaved"'),
        ({"data": {"source": "stdlb"}}, "did you mean 'stdlib'?"),
        ({"data": {"source": "digits"}}, "data.source: digits are images"),
    ],
)
def test_what_is_wrong_in_plain_words(changes: dict[str, Any], expected: str) -> None:
    assert expected in python_problems(**changes)


def test_a_model_is_required() -> None:
    with pytest.raises(InputError, match="names no model; add family"):
        Job(data={"seq_len": 4}, train=TRAIN)


def test_required_keys_come_with_an_example() -> None:
    with pytest.raises(InputError) as caught:
        Job(model={"family": "llama"})
    found = str(caught.value)
    for key in ("model.layers", "model.vocab", "data.seq_len", "train.steps", "train.lr", "train.global_batch"):
        assert f"{key}: is required" in found
    assert found.count("for example:") == len(found.splitlines())


def test_the_shape_of_a_folder_is_not_said_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="layers: is not used with hf"):
        Job(model={"hf": str(tmp_path), "layers": 3}, data={"seq_len": 4}, train=TRAIN)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        Job(model={"hf": str(tmp_path)}, data={"seq_len": 4}, train=TRAIN)


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    made = Job(model={"hf": str(tmp_path)}, data={"seq_len": 4}, train=TRAIN)
    assert made.data.tokenizer == str(tmp_path)


def test_paths_start_from_the_file_that_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "jobs"
    inside.mkdir()
    (inside / "text.txt").write_text("hello")
    (tmp_path / "other.txt").write_text("hello")
    (inside / "job.toml").write_text(SMALL_JOB.replace('"stdlib"', '"text.txt"'))
    monkeypatch.chdir(tmp_path)
    assert load_job("jobs/job.toml").data.source == str(inside / "text.txt")
    assert load_job("jobs/job.toml", ["data.source=other.txt"]).data.source == str(tmp_path / "other.txt")


def test_a_module_is_found_beside_its_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        '[model]\nmodule = "net:build"\n[data]\nsource = "digits"\n[train]\nsteps=1\nlr=1.0\nglobal_batch=1\n'
    )
    assert load_job(path).model.module_folder == str(tmp_path)


def test_planning_needs_no_data(small: Path) -> None:
    assert load_job(small, ["data.source=/nowhere"], data_must_exist=False).data.source == "/nowhere"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[model\n", "not valid TOML"),
        (b"a = 1\na = 2\n", "not valid TOML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"model = 3\n", "model: must be a section of keys, not 3"),
        (b"extends = 3\n", "extends: must be the path of another job file"),
        (b"x = " + b"[" * 5000, "job.toml"),
        (b"# " + b"x" * (1 << 20), "larger than a job file may be"),
    ],
)
def test_files_that_cannot_be_jobs(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    assert expected in "\n".join(problems(path))


def test_a_missing_file_is_named_with_the_nearest(small: Path) -> None:
    assert problems(small.with_name("jib.toml"))[0].endswith("no such job file; did you mean 'job.toml'?")
    assert "is a folder, not a job file" in problems(small.parent)[0]


def test_lines_of_keys() -> None:
    text = 'a = """\n[x]\ny = 1\n"""\n[s]  # comment\nb.c = [\n  1,\n]\n[t.u]\nd=1\n'
    assert key_lines(text) == {"a": 1, "s": 5, "s.b": 6, "s.b.c": 6, "t.u": 9, "t": 10, "t.u.d": 10}


def test_round_trip(small: Path, tmp_path: Path) -> None:
    for made in (
        load_job(small, ["layout.pp=2", "serve.max_len=64", "train.clip=0"]),
        job(model={"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        Job(
            model={"module": "net:build", "arguments": {"a b": [1, 2.5, "x", {"y": True}], "deep": {}}},
            data={"source": "digits"},
            train=TRAIN,
        ),
    ):
        path = tmp_path / "resolved.toml"
        path.write_text(job_to_toml(made))
        assert load_job(path) == made


def test_settings_of_serve(tmp_path: Path, small: Path) -> None:
    assert read_serve(["serve.http_port=0"], tmp_path / "none").http_port == 0
    small.write_text(SMALL_JOB + "[serve]\nmax_batch = 3\nhttp_port = 5\n")
    made = read_serve(["serve.http_port=0"], small)
    assert (made.max_batch, made.http_port) == (3, 0)
    with pytest.raises(InputError) as caught:
        read_serve(["serve.htp_port=0", "train.lr=1", "serve.tp=0"], small)
    assert len(caught.value.problems) == 3


def test_schema_describes_every_key() -> None:
    schema = json_schema()
    json.dumps(schema)
    sections = set(schema["properties"]) - {"extends"}
    assert {key.partition(".")[0] for key in job_keys()} == sections
    assert "required" not in schema
    assert all(job_keys().values())
    train = schema["$defs"]["TrainSection"]
    assert train["properties"]["precision"]["enum"] == ["auto", "fp32", "bf16"]
    assert train["additionalProperties"] is False


def test_every_key_is_in_the_page(request: pytest.FixtureRequest) -> None:
    page = (request.config.rootpath / "docs" / "job.md").read_text()
    missing = [key for key in job_keys() if f"`{key.partition('.')[2]}`" not in page]
    assert missing == []


names = st.sampled_from(["model", "data", "task", "train", "layout", "serve", "extra", "extends", "cluster"])
keys = st.sampled_from([*(key.partition(".")[2] for key in job_keys()), "typo", "", "a.b", "\0"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**18, 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["llama", "auto", "bpe", "a:b", "/", "stdlib", "digits", "language-model"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.dictionaries(names, st.dictionaries(keys, values, max_size=5) | values, max_size=5))
def test_any_values_make_a_job_or_problems(sections: dict[str, Any]) -> None:
    try:
        made = Job(**sections)
    except InputError as error:
        assert error.problems
        text = str(error)
        assert "pydantic" not in text and "Input should" not in text
    else:
        assert isinstance(made, Job)


@quick
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_makes_a_job_or_problems(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_job(path)


@quick
@given(st.lists(st.text(max_size=20) | st.tuples(names, keys, st.text(max_size=12)).map("{0[0]}.{0[1]}={0[2]}".format)))
@example(["model.hf=~0"])
def test_any_overrides_make_a_job_or_problems(small: Path, overrides: list[str]) -> None:
    try:
        assert load_job(small, overrides).train.steps >= 1
    except InputError as error:
        assert "pydantic" not in str(error)


plain = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab \"'.\\é", max_size=4), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(st.dictionaries(st.text('abc "\\', max_size=4), plain, max_size=4))
def test_any_arguments_survive_the_round_trip(tmp_path: Path, arguments: dict[str, Any]) -> None:
    made = Job(model={"module": "net:build", "arguments": arguments}, data={"source": "digits"}, train=TRAIN)
    path = tmp_path / "job.toml"
    path.write_text(job_to_toml(made))
    assert load_job(path) == made


@quick
@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), plain, max_size=4))
def test_toml_text_is_toml(content: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text({"s": content})).get("s", {}) == content


def test_a_least_number_of_devices_above_all_of_them_is_refused() -> None:
    with pytest.raises(InputError, match=r"launch\.devices_min: is 5, more than cluster\.devices = 2; nearest: 2"):
        Job(
            model={"family": "llama", "layers": 1, "hidden": 8, "heads": 1, "ffn": 8, "vocab": 300},
            data={"seq_len": 8},
            train={"steps": 1, "lr": 1e-3, "global_batch": 2},
            cluster={"devices": 2},
            launch={"devices_min": 5},
        )
