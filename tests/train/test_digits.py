"""The image classifier of examples/ trains alike on every layout it is offered on, through the same loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright import verbs
from meshwright.run import RunFolder

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits.toml"
QUICK = ["train.steps=20", "train.eval_every=0", "train.warmup_steps=2", "model.arguments={width=16, depth=2}"]
LAYOUTS = {
    "replicated": ["layout.dp=2", "layout.shard=1", "cluster.devices=2"],
    "sharded": ["layout.dp=2", "layout.shard=2", "cluster.devices=2"],
    "pipeline": ["layout.pp=2", "layout.micro_batch=16", "cluster.devices=2"],
}


def trained(folder: Path, words: list[str]) -> tuple[list[float], dict[str, float]]:
    result = verbs.train(EXAMPLE, [*QUICK, *words], run=folder)
    return [step["loss"] for step in RunFolder(folder).steps()], result


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, float]]:
    pytest.importorskip("sklearn")
    return trained(tmp_path_factory.mktemp("digits") / "run", ["cluster.devices=1"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_digits_train_alike(layout: str, one_device: tuple[list[float], dict[str, float]], tmp_path: Path) -> None:
    expected, at_end = one_device
    losses, result = trained(tmp_path / "run", LAYOUTS[layout])
    assert len(losses) == 20 and losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] / 2
    assert result["accuracy"] == at_end["accuracy"] > 0.5
    assert result["held_out_loss"] == pytest.approx(at_end["held_out_loss"], rel=1e-5)
