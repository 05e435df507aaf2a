"""A hint is tested by following it: the command that it makes of a refused one has the problem no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meshwright.cli.main import main
from meshwright.data.tokenizer import bytes_tokenizer
from meshwright.families.decoder import parameters
from meshwright.families.llama.card import hf_names, shape_from_hf
from tests.cli.hints import follow
from tests.cli.test_refusals import ONE_PROBLEM, SHAPE, home

__all__ = ["home"]  # a fixture

HF_JOB = """\
[model]
hf = "hf"
[data]
source = "texts"
seq_len = 16
[train]
steps = 2
lr = 1e-3
global_batch = 12
compile = false
"""
LANGUAGE_MODEL = """\
import torch
class Net(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(vocab, 8), torch.nn.Linear(8, vocab)
    def forward(self, x, **inputs):
        return self.out(self.embed(x))
    def sample_input(self):
        return torch.zeros(1, 16, dtype=torch.int64)
def build(vocab=300):
    return Net(vocab)
"""
LANGUAGE_JOB = HF_JOB.replace('hf = "hf"', 'module = "words:build"\n[task]\nname = "language-model"')

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(home: Path, capfd: pytest.CaptureFixture[str]) -> Said:
    """Runs a command; returns its exit code and what it says on stderr."""
    model = home / "hf"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    for name, content in bytes_tokenizer().side_files().items():
        (model / name).write_bytes(content)
    shape = shape_from_hf(SHAPE)
    weights = {hf_names(shape)[one.name]: torch.randn(one.shape) / 50 for one in parameters(shape)}
    save_file(weights, model / "model.safetensors")
    (home / "hf.toml").write_text(HF_JOB)
    (home / "words.py").write_text(LANGUAGE_MODEL)
    (home / "words.toml").write_text(LANGUAGE_JOB)

    def run(words: list[str]) -> tuple[int, str]:
        code = main(words)
        return code, capfd.readouterr().err

    return run


FOLLOWED = [
    # a Hugging Face folder
    "check hf.toml data.seq_len=65",
    "plan hf.toml layout.tp=4 cluster.devices=4",
    "plan hf.toml layout.pp=4 cluster.devices=4",
    "plan hf.toml model.vocab=300",
    "plan hf.toml model.hf=hff",
    "check hf.toml train.global_batch=5 layout.dp=2 cluster.devices=2",
    "plan --serving hf.toml serve.max_len=65",
    "plan --serving hf.toml serve.tp=4",
    # a module
    pytest.param("check words.toml data.tokenizer=bytes model.arguments.vocab=200", marks=pytest.mark.slow),
    pytest.param("check net.toml data.source=texts", marks=pytest.mark.slow),
    # the data, and other verbs
    "check job.toml model.vocab=200",
    "check job.toml data.tokenizer=bpe model.vocab=200",
    "check job.toml data.seq_len=100000",
    "check job.toml data.source=digits",
    "explain job.toml train.stpes",
    "plan job.toml model.kv_heads=4",
    "plan job.toml train.warmup_steps=5",
]


@pytest.mark.parametrize("command", FOLLOWED)
def test_the_command_that_a_hint_makes_runs(command: str, said: Said) -> None:
    words = command.split()
    code, problem = said(words)
    assert code in (2, 3)
    better = follow(words, problem)
    assert better is not None and better != words, problem
    assert said(better) == (0, ""), (problem, better)


#: Hints that say in words what only a person can do: another file, another value, code.
IN_WORDS = (
    *("looked in", "name a run, a checkpoint", "for example: groups", "one kind of device is", "known: ", "such as"),
    *("must be a whole number, not", "must be a finite number", "calibrate", "the weights are elsewhere"),
    *("mypackage.net:build", "let it return the module itself", "name the folder that `train` made", "name one kind"),
)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for _, command, _ in ONE_PROBLEM}))
def test_a_hint_of_any_refusal_leads_out_of_its_problem(command: str, said: Said) -> None:
    words = command.split()
    _, problem = said(words)
    better = follow(words, problem)
    if better is None:
        assert any(text in problem for text in IN_WORDS), problem
        return
    assert better != words
    assert problem not in said(better)[1], better


def test_a_vocabulary_of_a_folder_is_no_key_of_the_job(home: Path, said: Said) -> None:
    (home / "hf" / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 200}))
    code, problem = said(["check", "hf.toml"])
    assert code == 2 and "model.vocab" not in problem
    assert "has 257 ids, but the model's embedding has 200 rows, none for " in problem
    assert "; give a tokenizer of at most 200 ids" in problem


@pytest.mark.slow
def test_the_commands_of_a_run_of_a_folder_are_followed(home: Path, said: Said) -> None:
    """Refusals of `train` in turn, each followed to a run that is done; then the folder moves, and then it changes."""
    code, problem = said(["train", "hf.toml", "train.steps=1", "cluster.devices=1", "--resume"])
    assert code == 2
    started = follow(["train", "hf.toml", "train.steps=1", "cluster.devices=1", "--resume"], problem)
    assert started == ["train", "hf.toml", "train.steps=1", "cluster.devices=1"]
    assert said(started)[0] == 0
    longer = [*(word for word in started if "steps" not in word), "train.steps=2"]
    code, problem = said(longer)
    resumed = follow(longer, problem)
    assert code == 2 and resumed == [*longer, "--resume"]
    assert said(resumed)[0] == 0
    shorter = [word.replace("steps=2", "steps=1") for word in resumed]
    code, problem = said(shorter)
    assert code == 2 and follow(shorter, problem) == [*(w for w in shorter if "steps" not in w), "train.steps=2"]

    (home / "hf").rename(home / "moved")
    (home / "texts").rename(home / "text")
    moved = [*longer[:1], "hf.toml", "model.hf=moved", "data.source=text", "cluster.devices=1", "train.steps=3"]
    code, problem = said([*moved, "--resume"])
    assert code == 0, problem
    (home / "moved" / "config.json").write_text(json.dumps({**SHAPE, "rope_theta": 77.0}))
    code, problem = said([*moved, "train.lr=1e-4", "--resume"])
    assert code == 2 and "moved/config.json: rope_theta is 77.0, but 10000.0 in " in problem
    assert follow([*moved, "--resume"], problem) is None and "bring it back" in problem
    (home / "moved" / "config.json").write_text(json.dumps(SHAPE))
    tokenizer = home / "moved" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    code, problem = said([*moved, "--resume"])
    assert code == 2 and "data.tokenizer: is 'files of digest" in problem
