from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from meshwright import verbs
from meshwright.cli import main as cli
from meshwright.errors import CannotWork, LayoutsDisagree
from tests.verify import skewed_model

JOB = """
[model]
module = "skewed_model:build"
arguments = { skew = SKEW }
[data]
source = "digits"
held_out = 0.2
[train]
steps = 100
lr = 1e-2
global_batch = 16
precision = "fp32"
[layout]
dp = 2
[cluster]
devices = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("sklearn")
    shutil.copy(Path(__file__).with_name("skewed_model.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "skewed_model", raising=False)  # another test's copy
    return tmp_path


def test_a_sound_layout_is_equal_and_nothing_is_left_behind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "job.toml").write_text(JOB.replace("SKEW", "0.0"))
    assert cli.main(["verify", "job.toml", "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["precision"], found["tolerance"]) == (4, "fp32", 1e-5)
    assert found["drift"]["relative"] <= found["drift"]["allowed"] and not found["without_dropout"]
    assert 0 <= found["loss"]["relative"] <= 1e-5 and 0 <= found["gradient"]["relative"] <= 1e-5
    assert found["layout"].startswith("dp2")
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"job.toml", "skewed_model.py"}


def test_a_wrong_layout_is_named_with_its_first_step_and_tensor(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "job.toml").write_text(JOB.replace("SKEW", "0.01"))
    assert cli.main(["verify", "job.toml", "--steps", "3"]) == 5
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "layout dp2" in shown.err and "step 1: the loss differs from one device's by" in shown.err
    assert "Traceback" not in shown.err


def test_a_layout_that_cannot_work_is_refused_before_anything_runs(folder: Path) -> None:
    (folder / "job.toml").write_text(JOB.replace("SKEW", "0.0"))
    assert cli.main(["verify", "job.toml", "layout.tp=2", "layout.dp=1"]) == 3


def test_more_ranks_than_cores_and_a_planned_layout(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} bottles of beer on the wall" for n in range(400)))
    (tmp_path / "job.toml").write_text(
        """
        model = { family = "llama", layers = 2, hidden = 32, heads = 4, ffn = 64, vocab = 300 }
        data = { source = "text.txt", seq_len = 32, tokenizer = "bytes", held_out = 0.1 }
        train = { steps = 100, lr = 1e-3, global_batch = 8 }
        layout = { dp = 2, shard = 2, tp = 2, micro_batch = 4 }
        cluster = { devices = 4 }
        """
    )
    found = verbs.verify(tmp_path / "job.toml", steps=3)
    assert found["layout"].startswith("dp2 tp2 shard2")
    assert found["loss"]["relative"] <= 1e-5


TEXT_JOB = """
model = { family = "llama", layers = 2, hidden = 32, heads = 4, ffn = 64, vocab = 300 }
data = { source = "text.txt", seq_len = 32, tokenizer = "bytes", held_out = 0.1 }
train = { steps = 100, lr = 1e-3, global_batch = 8 }
"""


@pytest.mark.parametrize(
    ("worker", "degrees", "step"),
    [
        pytest.param("from_the_start", {"tp": 2}, 1, id="tensor"),
        pytest.param("from_step_3", {"pp": 2}, 3, id="pipeline"),
        pytest.param("from_step_3", {"dp": 2, "shard": 2}, 3, id="sharded", marks=pytest.mark.slow),
        pytest.param("from_the_start", {"dp": 2}, 1, id="replicated", marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_wrong_by_a_thousandth_is_caught(
    worker: str, degrees: dict[str, int], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} bottles of beer on the wall" for n in range(400)))
    (tmp_path / "job.toml").write_text(TEXT_JOB)
    verification = importlib.import_module("meshwright.verify.run")
    monkeypatch.setattr(verification, "WORK", f"broken_worker:{worker}")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    layout = [f"layout.{name}={degree}" for name, degree in degrees.items()]
    with pytest.raises(LayoutsDisagree, match=rf"step {step}: the gradient of blocks\.1\.ffn\.down\.weight"):
        verbs.verify(tmp_path / "job.toml", ["cluster.devices=2", *layout], steps=3)


def test_dropout_is_left_out_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "job.toml").write_text(JOB.replace("SKEW", "0.5").replace("build", "dropped"))
    assert cli.main(["verify", "job.toml", "--steps", "2"]) == 0
    assert "compared without dropout" in capsys.readouterr().out


def test_other_random_numbers_are_refused() -> None:
    from meshwright.verify.work import refuse_random_numbers

    module = skewed_model.noisy()
    refuse_random_numbers(module)
    with pytest.raises(CannotWork, match=r"model\.module: draws random numbers in its forward pass"):
        module(torch.zeros(1, 8, 8))
    sound = skewed_model.build()
    refuse_random_numbers(sound)
    sound(torch.zeros(1, 8, 8))
