"""What the system refuses (a full disk, a limit, a place that cannot be written, bytes that are not text) is a named
problem, with the file and what helps. "Not expected" is for our bugs alone."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from meshwright import launch, verbs
from meshwright.cli import commands
from meshwright.cli.main import main
from meshwright.errors import InputError, RunFailed, refused_by_system
from meshwright.job import SMALL_JOB
from meshwright.layout import Layout
from meshwright.run import RunFolder
from tests.checkpoint.simulate import save_world, shapes_of, world_pieces

Output = pytest.CaptureFixture[str]

WORKER = """
import resource

def fail(payload, context):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # the log is longer: a write to it fails
    raise RuntimeError("the words of the error")
"""


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder that `report` accepts."""
    (tmp_path / "job.toml").write_text(SMALL_JOB)
    folder = RunFolder(tmp_path / "run").create()
    folder.job.write_text(SMALL_JOB)
    folder.write_plan(verbs.plan(tmp_path / "job.toml").as_dict())
    return folder


ON_ANOTHER = "import runpy, sys; sys.platform = 'darwin'; sys.argv = ['meshwright', 'plan', 'job.toml']; "


@pytest.mark.parametrize(
    "use",
    [
        "import meshwright",
        "from meshwright.checkpoint import Writer",
        "from meshwright.cli.main import main; main()",  # what the command `meshwright` runs
        "runpy.run_module('meshwright', run_name='__main__')",
    ],
)
def test_another_system_than_linux_is_refused_by_name_before_anything_else(use: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ON_ANOTHER + use], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stdout == ""
    said = ended.stderr.splitlines()[-1]
    assert "Meshwright runs on Linux alone, and this system is 'darwin'; nearest: " in said


def test_a_file_beyond_the_limit_is_named_with_what_helps(run: RunFolder, capsys: Output) -> None:
    with largest_file(100):
        code = main(["report", str(run.path)])
    said = capsys.readouterr().err
    assert code == 4
    assert said.startswith(f"error: {run.report}: File too large; raise the limit on the size of a file (ulimit -f)")
    assert not run.report.exists() and "not expected" not in said


def test_a_place_that_cannot_be_written_is_bad_input(run: RunFolder, capsys: Output) -> None:
    run.report.mkdir()
    assert main(["report", str(run.path)]) == 2
    assert capsys.readouterr().err == f"error: {run.report}: Is a directory\n"


@pytest.mark.parametrize(
    ("number", "kind", "nearest"),
    [
        (errno.ENOSPC, RunFailed, "free space on that disk"),
        (errno.EROFS, InputError, "name a folder that can be written"),
        (errno.EACCES, InputError, "change its permissions"),
        (errno.EMFILE, RunFailed, "ulimit -n"),
    ],
)
def test_refusals_say_what_helps(number: int, kind: type[Exception], nearest: str) -> None:
    refused = refused_by_system(OSError(number, os.strerror(number), "runs/a"))
    assert type(refused) is kind
    assert f"runs/a: {os.strerror(number)}; " in str(refused) and nearest in str(refused)


@pytest.mark.parametrize(
    ("error", "nearest"),
    [
        (MemoryError(), "take a smaller model or batch"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "take a smaller model or batch"),  # as mmap says it
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),  # as fork says it
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_too_little_memory_and_too_few_processes_are_named(
    error: Exception, nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(commands.COMMANDS, "doctor", fail)
    assert main(["doctor"]) == 4
    said = capsys.readouterr().err
    assert nearest in said and "not expected" not in said


def test_an_error_that_names_nothing_is_not_the_systems() -> None:
    assert refused_by_system(OSError("words of ours")) is None


def test_both_errors_are_said_where_telling_the_first_fails(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def fail(_: object) -> None:
        try:
            raise RunFailed("rank 1 died", resume="meshwright train job.toml --resume")
        except RunFailed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.jsonl")  # noqa: B904

    monkeypatch.setitem(commands.COMMANDS, "doctor", fail)
    assert main(["doctor"]) == 4
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["error: rank 1 died", "resume with: meshwright train job.toml --resume"]
    assert said[2].startswith("error: events.jsonl: No space left on device")


def test_events_name_their_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with largest_file(10), pytest.raises(OSError, match="only part of a line") as caught:
        folder.append_event("start", step=0)
    assert caught.value.filename == str(folder.events)


def test_a_worker_whose_log_is_full_still_says_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full_log_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rank-0.log").write_bytes(b"x" * 5000 + b"\n")
    with pytest.raises(RunFailed, match="the words of the error"):
        launch.local("full_log_worker:fail", {}, 1, tmp_path).wait()


def test_a_save_that_fails_says_why_and_leaves_no_part(tmp_path: Path) -> None:
    tensors = {name: torch.ones(200, 100) for name in ("a", "b", "optimizer.a")}
    world = world_pieces(Layout(dp=2, shard=2), shapes_of(tensors))
    save_world(tmp_path, 1, world, tensors)
    with largest_file(60_000), pytest.raises(RunFailed) as caught:
        save_world(tmp_path, 2, world, tensors, timeout_seconds=20)
    assert "saving step 2" in str(caught.value) and "File too large" in str(caught.value)
    assert str(tmp_path / "step-2") in str(caught.value)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]


def test_a_long_folder_for_temporary_files_is_named(tmp_path: Path) -> None:
    from meshwright.job import read_serve
    from meshwright.serve.server import engine_processes

    async def start() -> None:
        async with engine_processes(tmp_path, read_serve([], tmp_path / "none"), "fp32", tmp_path / ("l" * 110) / "x"):
            pass

    with pytest.raises(InputError, match=r"TMPDIR: .*too long.*; set it to a shorter folder"):
        asyncio.run(start())


def test_a_prompt_that_is_not_text_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert main(["generate", "no-such-run", "--prompt", "a\udcff"]) == 2
    assert "prompt: is not UTF-8 text: character 2" in capsys.readouterr().err
    for content, said in (
        (b"a\xff", "--prompt: stdin is not UTF-8 text: byte 2"),
        ("aé".encode("utf-16"), "--prompt: stdin is not UTF-8 text but UTF-16, by its byte order mark; convert it"),
        ("a".encode("utf-16-le"), "--prompt: stdin holds NUL bytes, so it is UTF-16 or no text; convert it"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
        assert main(["generate", "no-such-run", "--prompt", "-"]) == 2
        assert said in capsys.readouterr().err


def test_a_prompt_of_stdin_is_utf8_in_any_locale_without_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    monkeypatch.setattr(verbs, "generate", lambda model, prompt, **options: prompts.append(prompt))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffaé\n".encode()), encoding="latin-1"))
    assert main(["generate", "run", "--prompt", "-"]) == 0
    assert prompts == ["aé\n"]


@pytest.mark.parametrize(
    ("encoding", "key"), [("latin-1", b"# weights  = grad"), ("utf-8", "█ weights  ▓ grad".encode())]
)
def test_a_plan_is_shown_on_any_terminal(encoding: str, key: bytes, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(SMALL_JOB)
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", "plan", "job.toml", "cluster.named=l4"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert key in done.stdout
