"""A climb from the simplest use to the whole, as a person would type it: each command in a process of its own.

Read from top to bottom: what one command leaves behind is what the next one takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshwright import Job, verbs
from meshwright.run import RunFolder
from meshwright.serve.client import stream_grpc, stream_http

MESHWRIGHT = [sys.executable, "-m", "meshwright"]
SECONDS = 120.0

#: The tour's job: a model that trains in seconds, on texts that the tour writes itself.
TINY = {
    "model": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": 300},
    "data": {"source": "texts.jsonl", "seq_len": 32, "tokenizer": "bpe", "held_out": 0.1},
    "train": {"steps": 6, "lr": 5e-3, "global_batch": 4, "precision": "fp32", "eval_batches": 1},
}


def meshwright(folder: Path, *words: str) -> str:
    """Runs the command in `folder` and returns its stdout; it must end with 0."""
    done = subprocess.run([*MESHWRIGHT, *words], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"meshwright {' '.join(words)}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def job_toml() -> str:
    lines = []
    for section, keys in ({"model": {"family": "llama"}, "data": {}, "train": {}} | TINY).items():
        family = ['family = "llama"'] if section == "model" else []
        lines += [f"[{section}]", *family, *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def write_corpus(path: Path) -> None:
    """200 short texts, all different, with enough in common to be learnt from."""
    colours, animals = ("red", "blue", "green", "grey", "white"), ("fox", "owl", "hare", "crow")
    texts = [f"The {colours[i % 5]} {animals[i % 4]} met {i} others on road {i * 7 % 31}." for i in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@contextmanager
def served(folder: Path, run: str) -> Iterator[dict[str, Any]]:
    """The addresses of `meshwright serve`, which is then asked to end, and must end well."""
    words = ["serve", run, "serve.http_port=0", "serve.grpc_port=0"]
    with subprocess.Popen([*MESHWRIGHT, *words], cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert line, "the server ended before it was ready"
            yield json.loads(line)
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(timeout=SECONDS)
    assert status == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_corpus(tmp_path / "texts.jsonl")
    return tmp_path


def test_the_main_job(home: Path) -> None:
    write_a_job(home)
    plan_it(home)
    train_it(home)
    resume_it_on_another_layout(home)
    read_it_with_transformers(home)
    use_it(home)
    look_at_it(home)


def write_a_job(home: Path) -> None:
    """`new` prints a job to start from; `check` and `explain` say what a job holds."""
    assert set(tomllib.loads(meshwright(home, "new"))) >= {"model", "data", "train"}
    (home / "tiny.toml").write_text(job_toml())
    found = json.loads(meshwright(home, "check", "tiny.toml", "--json"))
    assert found["data"]["documents"] == 200
    assert found["data"]["duplicates"] == found["data"]["empty"] == 0
    rows = json.loads(meshwright(home, "explain", "tiny.toml", "train.lr", "train.seed", "train.seed=1", "--json"))
    origins = {row["key"]: (row["value"], row["origin"]) for row in rows}
    assert origins["train.seed"] == (1, "command line")
    assert origins["train.lr"][1].startswith("tiny.toml:")


def plan_it(home: Path) -> None:
    """`plan` gives its verdict in words and in JSON, and Python gets the same."""
    devices = "cluster.devices=2"
    assert "FITS" in meshwright(home, "plan", "tiny.toml", devices)
    said = json.loads(meshwright(home, "plan", "tiny.toml", devices, "--json"))
    job = Job(
        model={"family": "llama", **TINY["model"]},
        data={**TINY["data"], "source": str(home / "texts.jsonl")},
        train=TINY["train"],
        cluster={"devices": 2},
    )
    chosen = verbs.plan(job).chosen
    assert chosen.layout.as_dict() == said["chosen"]["layout"]
    assert chosen.layout.devices == 2


def train_it(home: Path) -> None:
    """`train` on two processes, replicated, for the first half of the steps: events, a checkpoint, a report."""
    meshwright(home, "train", "tiny.toml", "cluster.devices=2", "layout.dp=2", "train.steps=3")
    run = RunFolder(home / "runs" / "tiny")
    losses = [event["loss"] for event in run.steps()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert (run.checkpoints / "step-3" / "manifest.json").is_file()
    assert run.report.is_file()


def resume_it_on_another_layout(home: Path) -> None:
    """The same run goes on tensor-parallel: nothing is converted."""
    words = ("cluster.devices=2", "layout.tp=2", "--resume", "--json")
    result = json.loads(meshwright(home, "train", "tiny.toml", *words))
    assert result["step"] == 6
    run = RunFolder(home / "runs" / "tiny")
    assert [event["step"] for event in run.steps()] == [1, 2, 3, 4, 5, 6]
    layouts = [event["layout"] for event in run.read_events() if event["event"] == "start"]
    assert [(layout["dp"], layout["tp"]) for layout in layouts] == [(2, 1), (1, 2)]
    assert (run.checkpoints / "step-6" / "model" / "config.json").is_file()


def read_it_with_transformers(home: Path) -> None:
    """A checkpoint's `model` is a Hugging Face folder."""
    transformers = pytest.importorskip("transformers")
    folder = home / "runs" / "tiny" / "checkpoints" / "step-6" / "model"
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.vocab_size == 300
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("The red fox", add_special_tokens=False)["input_ids"]) == "The red fox"


def use_it(home: Path) -> None:
    """`generate` continues a text; `serve` streams the same over both wires."""
    prompt, tokens = "The red fox", 12
    words = ("runs/tiny", "--prompt", prompt, "--max-tokens", str(tokens), "--json")
    alone = json.loads(meshwright(home, "generate", *words))
    assert 1 <= alone["tokens"] <= tokens
    with served(home, "runs/tiny") as at:
        assert at["model"] == "tiny"
        assert "".join(stream_http(at["http"], prompt, max_tokens=tokens, temperature=0.0)) == alone["text"]
        pieces = stream_grpc(at["grpc"], prompt, model=at["model"], max_tokens=tokens, temperature=0.0)
        assert "".join(pieces) == alone["text"]
    with pytest.raises(ProcessLookupError):
        os.kill(at["pid"], 0)


def look_at_it(home: Path) -> None:
    """`report` names one HTML file that needs nothing else."""
    page = Path(home, meshwright(home, "report", "runs/tiny").strip())
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!") and "tiny" in text
    assert 'src="http' not in text
