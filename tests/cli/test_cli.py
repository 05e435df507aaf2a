"""The command line: help, exit codes, messages, and that stdout is the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from meshwright.cli import commands, completion
from meshwright.cli.main import main
from meshwright.cli.parser import build_parser
from meshwright.errors import InputError, LayoutsDisagree, RunFailed
from meshwright.job import SMALL_JOB, load_job

PARSER, VERBS = build_parser()
Output = pytest.CaptureFixture[str]


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text(SMALL_JOB)
    return str(path)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"meshwright {verb}" in capsys.readouterr().out.partition("example")[2]


def test_every_verb_is_a_command() -> None:
    assert set(commands.COMMANDS) == set(VERBS)


def test_version(capsys: Output) -> None:
    from meshwright import __version__

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"meshwright {__version__}\n"


def test_no_verb_shows_the_help(capsys: Output) -> None:
    assert main([]) == 0
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pln"], "unknown verb 'pln'; did you mean 'plan'?"),
        (["plan", "j.toml", "--jsn"], "unknown flag '--jsn'; did you mean '--json'?"),
        (["--versoin"], "unknown flag '--versoin'; did you mean '--version'?"),
        (["plan"], "the following arguments are required: JOB"),
        (["plan", "j.toml", "--serving", "--write", "d"], "--serving does not use --write; leave out --write"),
        (["plan", "j.toml", "--advice", "--for", "deepspeed"], "--advice does not use --for; leave out --for"),
        (["report", "a", "b"], "unexpected argument 'b'"),
        (["verify", "j.toml", "--steps", "0"], "must be a whole number of at least 1, not '0'"),
        (["generate", "r", "--prompt", "a", "--top-p", "nan"], "must be a number from 0 to 1, not 'nan'"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
        (["train", "no-such.toml"], "no such job file"),
        (["generate", "no-such-run", "--prompt", "x"], "no-such-run"),
        (["report", "no-such-run"], "is not a run folder"),
        (["serve", "no-such-run", "serve.port=1"], "serve.port: unknown key"),
    ],
)
def test_bad_input_ends_with_2_and_says_why(arguments: list[str], expected: str, capsys: Output) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_every_problem_is_listed(small: str, capsys: Output) -> None:
    assert main(["plan", small, "train.stpes=3", "train.lr=fast", "layout.tp=4"]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'steps'?" in said
    assert "train.lr: must be a number" in said
    assert "layout.tp" in said, "what the plan would refuse is listed with the rest"


def test_what_cannot_work_ends_with_3(small: str, capsys: Output) -> None:
    assert main(["plan", small, "layout.tp=4", "cluster.devices=4"]) == 3
    assert "nearest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (RunFailed("rank 1 died", resume="meshwright train job.toml --resume"), 4, "resume with: meshwright train"),
        (LayoutsDisagree("step 3: loss"), 5, "error: step 3: loss"),
        (InputError("this"), 2, "error: this"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ValueError("of ours"), 4, "MESHWRIGHT_DEBUG=1"),
        (BrokenPipeError(32, "Broken pipe"), 4, "Broken pipe"),  # of another pipe than stdout's
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(commands.COMMANDS, "doctor", fail)
    assert main(["doctor"]) == code
    said = capsys.readouterr()
    assert expected in said.err
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("MESHWRIGHT_DEBUG", "1")
    assert main(["train", "no-such.toml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_new_prints_a_job_that_loads(tmp_path: Path, capsys: Output) -> None:
    assert main(["new"]) == 0
    path = tmp_path / "job.toml"
    path.write_text(capsys.readouterr().out)
    assert load_job(path).model.family == "llama"


def test_new_prints_the_schema(capsys: Output) -> None:
    assert main(["new", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["extends"]


def test_explain_says_where_a_value_came_from(small: str, capsys: Output) -> None:
    assert main(["explain", small, "train.lr", "train.steps", "train.steps=7", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["train.steps"] | {"meaning": ""} == {
        "key": "train.steps",
        "value": 7,
        "origin": "command line",
        "meaning": "",
    }
    assert rows["train.lr"]["origin"].startswith(f"{small}:")
    assert len(rows) == 2


def test_explain_shows_a_section_and_names_the_nearest_key(small: str, capsys: Output) -> None:
    assert main(["explain", small, "checkpoint"]) == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert keys == ["checkpoint.every", "checkpoint.keep", "checkpoint.asynchronous", "checkpoint.url"]
    assert main(["explain", small, "lr"]) == 2
    assert "did you mean 'train.lr'?" in capsys.readouterr().err


def test_explain_prints_the_resolved_job(small: str, capsys: Output) -> None:
    assert main(["explain", small, "train.lr=0.25", "--toml"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["train"]["lr"] == 0.25


def test_overrides_may_follow_flags(small: str, capsys: Output) -> None:
    assert main(["plan", small, "--json", "layout.dp=1", "cluster.devices=1"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["layout"]["dp"] == 1


def test_the_plan_is_one_json_document(small: str, capsys: Output) -> None:
    assert main(["plan", small, "--json", "data.source=/no/data/is/needed"]) == 0
    said = capsys.readouterr()
    plan = json.loads(said.out)
    assert said.err == ""
    predicted = plan["chosen"]["predicted"]
    assert predicted["step_seconds"]["low"] <= predicted["step_seconds"]["mid"] <= predicted["step_seconds"]["high"]
    assert {"chosen", "runners_up", "rejected"} <= set(plan)


def test_a_plan_for_another_framework_for_money_and_for_several_kinds(small: str, capsys: Output) -> None:
    gpus = ["cluster.named=h100-sxm-80gb", "cluster.devices=4"]
    assert main(["plan", small, "--json", "--for", "megatron-lm", *gpus, "layout.pp=2", "layout.vpp=2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["framework"] == "megatron-lm" and plan["chosen"]["layout"]["schedule"] == "interleaved"
    assert main(["plan", small, "--json", "--objective", "money", *gpus]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["objective"] == "money" and plan["chosen"]["layout"]["dp"] <= 4
    groups = "cluster.groups=[{named='l4',devices=2},{named='a100-sxm-80gb',devices=2}]"
    assert main(["plan", small, "--json", groups]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [share["group"] for share in plan["shares"]] == ["l4", "a100-sxm-80gb"]
    assert main(["plan", small, groups]) == 0
    assert "share" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["0", "20", "60", "200"])
def test_a_plan_is_shown_on_any_width(
    columns: str, small: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["plan", small, "layout.dp=1", "cluster.devices=1"]) == 0
    assert "FITS" in capsys.readouterr().out


def test_the_layout_table(small: str, capsys: Output) -> None:
    assert main(["plan", small, "--layout-table", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["heads"] == "tp"


def test_check_counts_the_data(tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"text number {index} " * 40)
    (folder / "again.txt").write_text("text number 3 " * 40)
    (folder / "empty.txt").write_text("")
    job = tmp_path / "job.toml"
    job.write_text(SMALL_JOB.replace('"stdlib"', '"texts"').replace("256 ", "8 ").replace('"bpe"', '"bytes"'))
    assert main(["check", str(job), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["duplicates"] == 1
    assert found["data"]["empty"] == 1
    assert found["data"]["tokens"] > 0
    assert found["parameters"] > 0


def test_a_run_is_not_overwritten(small: str, tmp_path: Path, capsys: Output) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.toml").write_text(SMALL_JOB)
    assert main(["train", small, "--run", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", small, "--run", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


def test_a_run_keeps_its_model(small: str, tmp_path: Path, capsys: Output) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.toml").write_text(SMALL_JOB)
    assert main(["train", small, "model.layers=5", "--run", str(run), "--resume"]) == 2
    assert "model.layers: is 5, the run" in capsys.readouterr().err


def test_a_named_device_is_for_planning(small: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["train", small, "cluster.named=h100-sxm-80gb", "--run", str(tmp_path / "run")]) == 3
    assert "cluster.named" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", ["new --schema", "--help", "plan --help"])
def test_a_reader_that_leaves_is_fine(words: str) -> None:
    command = f"{sys.executable} -m meshwright {words} | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def in_bash(command: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


@pytest.mark.parametrize("words", ["plan JOB", "plan JOB --json", "predict CASES", "new --schema", "--help"])
@pytest.mark.parametrize(
    ("where", "unbuffered", "reason"),
    [
        (">&-", "", "Bad file descriptor"),
        (">/dev/full", "", "No space left on device"),
        (">/dev/full", "1", "No space left on device"),
    ],
)
def test_output_that_cannot_be_written_is_said_in_a_line(
    words: str, where: str, unbuffered: str, reason: str, small: str, tmp_path: Path
) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text("{}\n" * 3)
    command = f"{sys.executable} -m meshwright {words} {where}".replace("JOB", small).replace("CASES", str(cases))
    done = in_bash(command, unbuffered)
    hint = "send it to a file on a disk with free space, or to /dev/null"
    said = f"error: stdout: the output cannot be written: {reason}; {hint}\n"
    assert (done.returncode, done.stderr) == (4, said)


def test_the_error_before_output_that_cannot_be_written_is_the_one_that_is_said(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\n"
        "from meshwright.cli import commands, main as cli\n"
        "def fail(_):\n"
        "    print('begun')\n"
        "    raise cli.RunFailed('rank 1 died', resume='meshwright train job.toml --resume')\n"
        "commands.COMMANDS['doctor'] = fail\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    done = in_bash(f"{sys.executable} {script} >/dev/full")
    said = "error: rank 1 died\nresume with: meshwright train job.toml --resume\n"
    assert (done.returncode, done.stderr) == (4, said)


def test_errors_do_not_go_to_stdout_where_stderr_is_closed() -> None:
    done = in_bash(f"{sys.executable} -m meshwright train no-such.toml 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], {"plan"}),
        (["plan", "job.toml", "train.l"], {"train.lr="}),
        (["train", "job.toml", "--r"], {"--run", "--resume"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["plan", ""], set()),  # files, which bash itself completes
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    typed = " ".join(f"'{word}'" for word in ["meshwright", *words])
    script = f"{completion.script('bash')}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _meshwright\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb(shell: str, capsys: Output) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)
    assert "train.lr=" in script


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", "explain", "/no/such/job.toml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "MESHWRIGHT_DEBUG": ""},
    )
    assert done.returncode == 2
    assert "no such job file" in done.stderr or "there is no folder" in done.stderr


def test_a_plan_is_written_into_a_folder_that_is_its_own(small: str, tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "plans"
    for _ in range(2):  # the second replaces the first
        assert main(["plan", small, "--json", "--write", str(folder)]) == 0
    said = capsys.readouterr()
    assert json.loads((folder / "plan.json").read_text()) == json.loads(said.out[said.out.index("}\n{") + 2 :])
    assert all(f"wrote {path}" in said.err for path in folder.iterdir() if path.name != "written.json")
    (folder / "deepspeed.json").write_text("{}")
    assert main(["plan", small, "--write", str(folder)]) == 2
    assert "deepspeed.json: was changed since" in capsys.readouterr().err
