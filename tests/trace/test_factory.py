"""Finding the user's build function, and what is said when it is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from meshwright.errors import InputError
from meshwright.trace import load_factory

FILE = """
from torch import nn
LIMIT = 3
def build(width, depth=2):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
def other(**anything):
    return len(anything)
def by_position(width, /):
    return nn.Linear(width, width)
def fails():
    raise ValueError("no such width")
def leaves():
    print("good bye")
    raise SystemExit(0)
class Net(nn.Linear):
    def __init__(self, size=2):
        super().__init__(size, size)
"""


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mw_models.py").write_text(FILE)
    (tmp_path / "mw_package").mkdir()
    (tmp_path / "mw_package" / "mw_vision.py").write_text(FILE)
    (tmp_path / "mw_broken.py").write_text("import mw_models\nimport a_package_nobody_has\n")
    (tmp_path / "mw_typo.py").write_text("def build(:\n")
    (tmp_path / "mw_leaves.py").write_text("import sys\nprint('good bye')\nsys.exit(0)\n")
    (tmp_path / "json.py").write_text(FILE)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("mw_")]:
        del sys.modules[name]


@pytest.mark.parametrize("reference", ["mw_models:build", "mw_package.mw_vision:build"])
def test_builds_from_the_current_folder(folder: Path, reference: str) -> None:
    assert len(load_factory(reference, {"width": 4, "depth": 3})()) == 3  # type: ignore[arg-type]


def test_each_call_builds_another_module(folder: Path) -> None:
    factory = load_factory("mw_models:Net")
    assert isinstance(factory(), nn.Linear)
    assert factory() is not factory()


def test_builds_from_the_folder_of_the_job(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("jobs")
    (elsewhere / "mw_beside.py").write_text("from mw_sibling import Net")
    (elsewhere / "mw_sibling.py").write_text(FILE)
    assert isinstance(load_factory("mw_beside:Net", folders=[elsewhere])(), nn.Linear)


@pytest.mark.parametrize(
    ("reference", "arguments", "said"),
    [
        ("mw_models", {}, 'write "package.file:build"'),
        ("mw_models.py:build", {}, "did you mean 'mw_models'"),
        ("./mw_models:build", {}, 'write "package.file:build"'),
        ("mw_model:build", {}, "did you mean 'mw_models'"),
        ("mw_vision:build", {}, "did you mean 'mw_package.mw_vision'"),
        ("mw_package.mw_visions:build", {}, "did you mean 'mw_package.mw_vision'"),
        ("mw_models:biuld", {}, "did you mean 'build'"),
        ("mw_models:LIMIT", {}, "is a int, not a function"),
        ("mw_models:build", {"width": 1, "dept": 2}, "did you mean 'depth'"),
        ("mw_models:build", {}, "add width = ..."),
        ("mw_models:fails", {"width": 1}, "it takes no arguments"),
        ("mw_models:by_position", {}, "by position only"),
        ("mw_broken:build", {}, "No module named 'a_package_nobody_has'"),
        ("mw_typo:build", {}, r"mw_typo\.py:1"),
        ("mw_leaves:build", {}, r"importing 'mw_leaves' failed: SystemExit: 0 \(.*mw_leaves\.py:3\)"),
        ("json:build", {}, "give your file another name"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, reference: str, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_factory(reference, arguments)


def test_several_wrong_arguments_are_all_listed(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_factory("mw_models:build", {"wdth": 4, "dpth": 3})
    assert len(caught.value.problems) == 3  # two unknown, one missing


def test_a_function_that_returns_no_module_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="returned a int"):
        load_factory("mw_models:other", {"a": 1})()


def test_a_function_that_fails_is_reported_with_its_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"ValueError: no such width \(.*mw_models\.py:11\)"):
        load_factory("mw_models:fails")()


def test_a_function_that_exits_is_an_error_of_the_function(folder: Path) -> None:
    with pytest.raises(InputError, match=r"'mw_models:leaves' failed: SystemExit: 0 \(.*mw_models\.py:14\)"):
        load_factory("mw_models:leaves")()


def test_what_the_users_code_prints_goes_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for reference in ("mw_leaves:build", "mw_models:leaves"):
        with pytest.raises(InputError):
            load_factory(reference)()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "good bye\n" * 2)
