"""The README keeps its word: its job loads, its commands parse and run, its Python runs, its targets exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.cli.main import parse
from meshwright.job import load_job

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
#: Verbs that neither train nor serve nor measure: quick enough to be run here as they stand in the README.
QUICK = ("new", "check", "explain", "plan", "completion")
#: What the test's job reads in place of the whole standard library.
SMALL_DATA = 'source = "texts.txt"'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Each `meshwright ...` of the shell blocks and of the text, without its comment."""
    shell = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    inline = re.findall(r"`(meshwright [^`\n]+)`", TEXT)
    return [line for line in [*shell, *inline] if line.startswith("meshwright ")]


def words_of(command: str) -> list[str]:
    return shlex.split(command.partition(">")[0])[1:]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's job as job.toml, on a text of a few kilobytes."""
    lines = [f"line {i}: {'word ' * (i % 11)}{i * i}" for i in range(2000)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    job = re.sub(r'source = "stdlib"', SMALL_DATA, blocks("toml")[0])
    assert SMALL_DATA in job
    (tmp_path / "job.toml").write_text(re.sub(r"vocab = \d+", "vocab = 300", job))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_job_file_loads(tmp_path: Path) -> None:
    for number, block in enumerate(blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        assert load_job(path).model.family == "llama"


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_commands() -> None:
    verbs = {words_of(command)[0] for command in commands()}
    assert verbs >= {"new", "check", "explain", "plan", "verify", "train", "generate", "serve", "report", "doctor"}


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command: str) -> None:
    assert parse(words_of(command)).verb == words_of(command)[0]


@pytest.mark.parametrize("command", [command for command in commands() if words_of(command)[0] in QUICK])
def test_a_quick_command_runs(command: str, home: Path) -> None:
    words = [sys.executable, "-m", "meshwright", *words_of(command)]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def words_only(screen: str) -> list[str]:
    """Its lines without figures, names of layouts and bars: what is said on every machine alike."""
    lines = (re.sub(r"\b[a-z]*\d[\w.,]*", "#", line) for line in screen.splitlines())
    return [re.sub(r"[█▓▒░·]{2,}", "", re.sub(r"\s+", " ", line)).strip() for line in lines]


def test_the_captured_screen_has_the_words_of_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and layouts differ between machines; labels, headings and the other words do not."""
    captured = next(block for block in blocks("text") if block.startswith("$ meshwright plan"))
    monkeypatch.setenv("COLUMNS", "88")
    command = [sys.executable, "-m", "meshwright", *words_of(captured.splitlines()[0].removeprefix("$ "))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    of_readme, of_screen = words_only(captured), words_only(done.stdout)
    for label in ("FITS", "layout", "step", "cost", "why", "memory", "stage", "assumed"):
        said, says = (next(line for line in lines if line.startswith(label)) for lines in (of_readme, of_screen))
        assert said == says or label not in ("memory", "stage", "assumed")
    what_if = re.compile(r"what if .+: # ?% less time per sample \(.+\)")
    assert all(what_if.fullmatch(line) for line in (*of_readme, *of_screen) if line.startswith("what if"))


def test_the_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"@[A-Z]+@", TEXT) == []
