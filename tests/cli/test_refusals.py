"""What cannot be done is refused on stderr: what is wrong, where, and the nearest that works; stdout stays empty.

Exit 2 is bad input, 3 what is well-formed and cannot work. Nothing is started, and nobody sees a traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshwright.cli.main import main

JOB = """\
[model]
family = "llama"
layers = 2
hidden = 48
heads = 6
kv_heads = 2
ffn = 96
vocab = 300

[data]
source = "texts"
seq_len = 16
tokenizer = "bytes"

[train]
steps = 2
lr = 1e-3
global_batch = 12
precision = "fp32"

[cluster]
devices = 2
"""

#: An image classifier; "net.py" beside the job.
NET = """\
import torch

class Net(torch.nn.Sequential):
    def sample_input(self):
        return torch.zeros(1, 8, 8)

def build(width=10):
    return Net(torch.nn.Flatten(), torch.nn.Linear(64, width))

def three():
    return 3

def broken():
    raise OSError("the weights are elsewhere")
"""

NET_JOB = """\
[model]
module = "net:build"

[data]
source = "digits"

[train]
steps = 2
lr = 1e-3
global_batch = 8

[cluster]
devices = 2
"""

#: Runs a command that must end with the exit code; returns its lines on stderr.
Refused = Callable[..., list[str]]

LLAMA_405B = ["layers=126", "hidden=16384", "heads=128", "kv_heads=8", "ffn=53248", "vocab=128256"]

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(8):
        (texts / f"{index}.txt").write_text(f"text number {index}, and more of it " * 5)
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "gpus.toml").write_text(JOB.replace("devices = 2", ""))
    (tmp_path / "net.toml").write_text(NET_JOB)
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)  # the commands run in this process, each with its own net.py
    yield tmp_path
    sys.modules.pop("net", None)


@pytest.fixture
def refused(home: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused with `code`; returns its lines on stderr."""

    def run(code: int, *words: str) -> list[str]:
        status = main(words)
        said = capfd.readouterr()
        assert status == code, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        assert "MESHWRIGHT_DEBUG" not in said.err, "it should have been foreseen"
        lines = said.err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines)
        return lines

    return run


MIXED = "cluster.groups=[{named='l4',devices=2},{named='a100-sxm-80gb',devices=2}]"

#: (exit code, words of the command, what the one line says: where, what, nearest)
ONE_PROBLEM = [
    # keys and values
    (2, "plan job.toml train.stpes=3", "command line: train.stpes: unknown key; did you mean 'steps'?"),
    (2, "plan job.toml trian.steps=3", "command line: trian: unknown section; did you mean 'train'?"),
    (2, "plan job.toml train.steps=many", 'command line: train.steps: must be a whole number, not "many"'),
    (2, "plan job.toml train.lr=nan", "command line: train.lr: must be a finite number, not nan"),
    (2, "plan job.toml train.decay=cosin", "did you mean 'cosine'?"),
    (2, "plan job.toml steps", "command line: steps: is not section.key=value; for example: train.steps=100"),
    # files
    (2, "plan jbo.toml", "jbo.toml: no such job file; did you mean 'job.toml'?"),
    (2, "check job.toml data.source=text", "no file or folder"),
    (2, "check job.toml data.source=text", "did you mean 'texts'?"),
    (2, "check job.toml data.tokenizer=no.json", "command line: data.tokenizer: no file or folder"),
    # devices
    (2, "plan job.toml cluster.devices=0", "command line: cluster.devices: must be at least 1, not 0; nearest: 1"),
    (2, "plan job.toml cluster.devices=-3", "must be at least 1, not -3; nearest: 1"),
    (2, "plan job.toml cluster.named=h100-sxm", "cluster.named: unknown device 'h100-sxm'; nearest: h100-sxm-80gb"),
    (2, "plan job.toml cluster.named=abacus", "command line: cluster.named: unknown device 'abacus'; known: a100"),
    (3, "train job.toml cluster.named=l4", "command line: cluster.named: 'l4' can only be planned for"),
    # layouts
    (3, "plan job.toml layout.tp=4 cluster.devices=4", "layout.tp: tp=4 does not divide heads=6, kv_heads=2"),
    (3, "plan job.toml layout.tp=4 cluster.devices=4", "nearest: layout.tp=2"),
    (3, "plan net.toml train.global_batch=7", "command line: train.global_batch: global_batch=7 is not a multiple"),
    (3, "plan net.toml train.global_batch=7", "nearest: train.global_batch=6"),
    (3, "plan job.toml train.global_batch=7 layout.dp=2", "layout.dp: global_batch=7 is not a multiple"),
    (3, "plan job.toml layout.dp=2 layout.micro_batch=4", "nearest: layout.micro_batch=3"),
    (3, "plan job.toml layout.dp=2 layout.tp=2", "dp2 x tp2 x pp1 x cp1 is 4, not 2 devices"),
    (3, "plan job.toml layout.dp=2 layout.tp=2", "command line: layout.dp, layout.tp"),
    (3, "plan job.toml layout.dp=2 layout.tp=2", "nearest: layout.tp=1"),
    (
        3,
        "plan job.toml layout.cp=2",
        "layout.cp: cp=2: context parallel is not offered yet by meshwright; plan for ano",
    ),
    (3, "plan job.toml layout.cp=2", "plan for another framework with --for megatron-lm; nearest: layout.cp=1"),
    (
        3,
        "plan job.toml --for megatron-lm layout.cp=3",
        "cp=3 cuts a sequence into 6 equal pieces, and it has 16 tokens",
    ),
    (3, "plan job.toml --for megatron-lm layout.cp=16", "it has 16 tokens; nearest: layout.cp=2"),
    (3, "plan job.toml --for megatron-lm layout.ep=2", "this model has none; nearest: layout.ep=1"),
    (3, "plan job.toml --for megatron-lm layout.vpp=2 layout.pp=1", "and pp is 1; nearest: layout.vpp=1"),
    (3, "plan job.toml --for megatron-lm layout.vpp=2 layout.pp=2 layout.schedule=1f1b", "'1f1b' has vpp=1, not 2"),
    (
        3,
        "plan job.toml --for llm-foundry layout.tp=2",
        "tensor parallel is not offered by llm-foundry; nearest: layout.tp=1",
    ),
    (
        3,
        "plan job.toml --for torchtitan layout.pp=2 layout.vpp=2 layout.schedule=zbv cluster.devices=4 layout.tp=1",
        "wrong gradients without an error where blocks are sharded or replicated",
    ),
    (3, "plan job.toml layout.schedule=zbv", "schedule 'zbv' is not offered yet by meshwright; plan for another frame"),
    (
        3,
        "plan job.toml layout.offload=true",
        "not offered yet by meshwright; plan for another framework with --for mega",
    ),
    (2, "plan job.toml --for megatron", "--for: unknown framework 'megatron'; did you mean 'megatron-lm'?"),
    (2, "plan job.toml --objective fame", "--objective: unknown objective 'fame'; known: money, time"),
    (2, "plan job.toml --profile none.toml", "none.toml: no such profile"),
    # devices of several kinds
    (3, f"train gpus.toml {MIXED}", "cluster.groups: devices of several kinds can only be planned for: `train` runs"),
    (
        3,
        f"verify gpus.toml {MIXED}",
        "cluster.groups: devices of several kinds can only be planned for; name one kind",
    ),
    (
        2,
        f"plan job.toml cluster.devices=2 {MIXED}",
        "cluster.devices: is given by each of cluster.groups; leave it out",
    ),
    (2, "plan gpus.toml cluster.groups=[{named='l4',devices=2}]", "is one group; one kind of device is cluster.named"),
    (2, "plan gpus.toml cluster.groups=[{named='l4'}]", "cluster.groups[0][devices]: is required; for example: groups"),
    (2, "plan gpus.toml cluster.groups=3", "cluster.groups: must be a list of groups, not 3; for example"),
    (2, f"plan gpus.toml {MIXED}".replace("l4", "l5"), "cluster.named: unknown device 'l5'"),
    (3, f"plan gpus.toml {MIXED} layout.tp=5", "does not divide"),
    (3, "plan job.toml layout.tp=1 layout.sequence_parallel=true", "sequence_parallel splits over tp, and tp is 1"),
    (3, "plan job.toml layout.pp=2 layout.schedule=1f1b layout.micro_batch=12", "layout.micro_batch=6"),
    (
        3,
        "plan job.toml layout.pp=2 layout.schedule=1f1b train.global_batch=1",
        "nearest: layout.schedule=gp",
    ),
    # modules
    (2, "plan net.toml model.module=nett:build", "there is no module 'nett'; did you mean 'net'?"),
    (2, "plan net.toml model.module=net:biuld", "command line: model.module: "),
    (2, "plan net.toml model.module=net:biuld", "net.py has no 'biuld'; did you mean 'build'?"),
    (
        2,
        "plan net.toml model.module=net",
        'is not package.file:function, but "net"; for example: "mypackage.net:build"',
    ),
    (2, "plan net.toml model.module=net:three", "returned a int, not an nn.Module"),
    (2, "plan net.toml model.module=net:broken", "the weights are elsewhere"),
    (2, "plan net.toml model.arguments.wdith=3", "did you mean 'width'?"),
    (3, "plan net.toml layout.tp=2", "no table of logical axes to split its parameters by; add one for tp; nearest"),
    (3, "plan net.toml layout.pp=2", "does not name its blocks; give it an ordered nn.ModuleDict `blocks`; nearest"),
    # runs
    (2, "train job.toml --resume", "runs/job: holds no run to resume; leave --resume out to start one"),
    (2, "report runs/none", "runs/none: is not a run folder"),
    (2, "report .", ".: is not a run folder: it has no plan.json"),
    (2, "train job.toml --run net.py", "net.py: cannot be a run folder (File exists); name another with --run DIR"),
    (2, "train job.toml --run /proc/mine", "/proc/mine: cannot be a run folder"),
    (2, "generate runs/none --prompt x", "runs/none: is not a folder; name a run, a checkpoint, or a Hugging Face"),
    (2, "serve runs/none", "runs/none: is not a folder"),
    (2, "generate texts --prompt x", "texts: holds no model: no config.json"),
    (2, "serve texts serve.port=1", "serve.port: unknown key"),
]


@pytest.mark.parametrize(
    ("code", "words", "said"), ONE_PROBLEM, ids=[f"{case[1]}-{case[2][:12]}" for case in ONE_PROBLEM]
)
def test_one_problem_is_one_line(code: int, words: str, said: str, refused: Refused) -> None:
    lines = refused(code, *words.split())
    assert len(lines) == 1
    assert said in lines[0]


def test_a_value_in_the_file_is_named_with_its_line(home: Path, refused: Refused) -> None:
    (home / "job.toml").write_text(
        JOB.replace("steps = 2", "stpes = 2\nsteps = 2").replace("devices", "named = 'x'\n#")
    )
    lines = refused(2, "plan", "job.toml")
    assert "error: job.toml:16: train.stpes: unknown key; did you mean 'steps'?" in lines
    assert any(line.startswith("error: job.toml:23: cluster.named: unknown device 'x'") for line in lines)


def test_a_model_that_fits_nowhere_says_what_would_do(refused: Refused) -> None:
    shape = [f"model.{pair}" for pair in LLAMA_405B]
    (line,) = refused(3, "plan", "job.toml", "cluster.named=h100-sxm-80gb", "cluster.devices=1", *shape)
    assert "model: the model does not fit 1 x h100-sxm-80gb" in line
    assert "GiB too much" in line
    assert "nearest that fits: " in line and "such devices" in line


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (
            2,
            "check job.toml train.stpes=3 train.lr=fast layout.tp=4 data.source=no model.heads=0",
            (
                "did you mean 'steps'?",
                "train.lr: must be a number",
                "data.source: no file",
                "model.heads: must be at le",
            ),
        ),
        (2, "check job.toml train.stpes=3 layout.tp=4", ("did you mean 'steps'?", "; tp=4 does not divide heads=6")),
        (2, "check job.toml data.source=empty.txt layout.tp=4", ("holds no text", "; tp=4 does not divide heads=6")),
        (2, "check job.toml data.source=empty.txt cluster.named=x", ("holds no text", "unknown device 'x'")),
        (2, "plan net.toml model.module=net:biuld cluster.named=x", ("did you mean 'build'?", "unknown device 'x'")),
        (
            3,
            "plan job.toml cluster.devices=4 layout.dp=2 layout.tp=4 layout.ep=2",
            ("layout.tp: tp=4 does not divide heads=6", "layout.ep", "is 8, not 4 devices"),
        ),
        (
            3,
            "plan net.toml layout.tp=2 layout.sequence_parallel=true",
            (
                "layout.tp: tp=2: this model has no table",
                "layout.sequence_parallel: sequence_parallel splits over tp, and ",
            ),
        ),
    ],
)
def test_several_problems_are_all_listed(
    code: int, words: str, expected: tuple[str, ...], home: Path, refused: Refused
) -> None:
    (home / "empty.txt").write_text("")
    lines = refused(code, *words.split())
    assert len(lines) == len(expected)
    for said in expected:
        assert [line for line in lines if said in line], f"{said!r} is not in {lines}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pipe", "is a pipe, a socket or a device"),
        ("/dev/zero", "which cannot be indexed"),
        ("nothing", "no file in the folder"),
        ("empty.txt", "holds no text"),
        ("one.txt", "data.seq_len"),
        ("words.pdf", "no reader for 'words.pdf'"),
    ],
)
def test_data_that_cannot_be_read(source: str, said: str, home: Path, refused: Refused) -> None:
    os.mkfifo(home / "pipe")
    (home / "nothing").mkdir()
    (home / "empty.txt").write_text("")
    (home / "one.txt").write_text("short")
    (home / "words.pdf").write_bytes(b"%PDF-1.7\0\xff")
    lines = refused(2, "check", "job.toml", f"data.source={source}")
    assert any(said in line and "data.s" in line for line in lines)
    assert refused(2, "train", "job.toml", f"data.source={source}")
    assert not (home / "runs" / "job" / "job.toml").exists(), "what never began is no run"


def hugging_face(home: Path, config: str) -> list[str]:
    folder = home / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (home / "hf.toml").write_text(
        '[model]\nhf = "folder"\n[data]\nsource = "texts"\nseq_len = 16\ntokenizer = "bytes"\n'
        "[train]\nsteps = 1\nlr = 1e-3\nglobal_batch = 2\n[cluster]\ndevices = 1\n"
    )
    return ["hf.toml"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "llama",', "folder/config.json: is not valid JSON"),
        ("[1]", "folder/config.json: is not a JSON object"),
        (
            json.dumps({"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}),
            "model_type 'evil' is not a decoder that we know; ",
        ),
        (json.dumps(SHAPE | {"hidden_size": -1}), "hidden_size must be a positive whole number, found -1"),
        (json.dumps(SHAPE | {"hidden_act": "gelu"}), "hidden_act 'gelu' is not supported; supported: \"silu\""),
        (json.dumps(SHAPE | {"model_type": {}}), "folder/config.json: model_type must be text, found {}"),
        (json.dumps(SHAPE | {"num_hidden_layers": 10**9}), "num_hidden_layers must be at most 10000, found 1000000000"),
        (json.dumps(SHAPE | {"max_position_embeddings": -1}), "folder/config.json: max_position_embeddings must be a"),
        (json.dumps(SHAPE | {"num_key_value_heads": 3}), "folder/config.json: num_key_value_heads 3 does not divide"),
    ],
)
def test_a_hostile_config(config: str, said: str, home: Path, refused: Refused) -> None:
    lines = refused(2, "plan", *hugging_face(home, config))
    assert any(said in line for line in lines)


def test_a_folder_that_is_not_there(home: Path, refused: Refused) -> None:
    hugging_face(home, json.dumps(SHAPE))
    (line,) = refused(2, "plan", "hf.toml", "model.hf=foldr")
    assert "command line: model.hf: no folder" in line and "did you mean 'folder'?" in line


def test_a_folder_without_weights_is_no_run(home: Path, refused: Refused) -> None:
    hugging_face(home, json.dumps(SHAPE))
    (line,) = refused(2, "train", "hf.toml")
    assert "has no weights: neither model.safetensors" in line
    (home / "folder" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (line,) = refused(2, "train", "hf.toml")
    assert "pytorch_model.bin, a format that can run code" in line and "safetensors" in line


def test_code_in_a_folder_is_never_run(home: Path, refused: Refused) -> None:
    hugging_face(home, json.dumps(SHAPE | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    (home / "folder" / "evil.py").write_text(f"open({str(home / 'was-run')!r}, 'w')\n")
    (home / "folder" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    lines = refused(2, "train", "hf.toml")
    assert any("has no tensor 'model.embed_tokens.weight'" in line for line in lines)
    assert not (home / "was-run").exists()


def test_a_run_is_not_overwritten(home: Path, refused: Refused) -> None:
    (home / "runs" / "job").mkdir(parents=True)
    shutil.copy(home / "job.toml", home / "runs" / "job")
    (line,) = refused(2, "train", "job.toml")
    assert "runs/job: holds a run already; to resume it: meshwright train job.toml --resume" in line


def checkpointed(home: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    assert main(["train", "job.toml", "cluster.devices=1"]) == 0, capfd.readouterr().err
    capfd.readouterr()
    return home / "runs" / "job" / "checkpoints" / "step-2"


def test_a_checkpoint_that_was_changed(home: Path, refused: Refused, capfd: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in the weights, then a manifest that was edited: both are named, and neither is used."""
    checkpoint = checkpointed(home, capfd)
    words = ("train", "job.toml", "cluster.devices=1", "train.steps=3", "--resume")
    weights = next((checkpoint / "model").glob("*.safetensors"))
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
    for verb in (words, ("report", "runs/job"), ("generate", "runs/job", "--prompt", "a")):
        lines = refused(2, *verb)
        assert any(str(weights.relative_to(home)) in line and "digest" in line for line in lines), verb
    weights.write_bytes(sound)
    tokenizer = checkpoint / "model" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content + b" ")
    for verb in (("report", "runs/job"), ("generate", "runs/job", "--prompt", "a"), ("serve", "runs/job")):
        (line,) = refused(2, *verb)
        assert str(tokenizer.relative_to(home)) in line, verb
    tokenizer.write_bytes(content)
    assert main(["report", "runs/job"]) == 0
    capfd.readouterr()
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step":2', '"step":9').replace('"step": 2', '"step": 9'))
    lines = refused(2, *words)
    assert any(str(checkpoint) in line for line in lines)
