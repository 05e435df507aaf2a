"""A Hugging Face folder trains as it is, and comes out as one that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from meshwright import verbs
from meshwright.data import Manifest
from meshwright.job import Job
from meshwright.run import RunFolder
from meshwright.train.model import model_of_job

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
LLAMA = transformers.LlamaConfig(**SMALL)
QWEN3 = transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)
FOLDERS = [
    pytest.param(LLAMA, {"dp": 1, "tp": 2, "sequence_parallel": True}, id="llama on tensor parallel"),
    pytest.param(QWEN3, {"dp": 2, "shard": 2}, id="qwen3, tied, sharded"),
    pytest.param(QWEN3, {"dp": 1, "pp": 2}, id="qwen3, tied, on two stages", marks=pytest.mark.slow),
]


def test_what_a_folder_says_comes_out_again(tmp_path: Path) -> None:
    said = {"eos_token_id": [257, 259], "pad_token_id": 260, "do_sample": True, "temperature": 0.6, "bos_token_id": 3}
    config = {
        **LLAMA.to_dict(),
        "pad_token_id": 7,
        "initializer_range": 0.5,
        "dtype": "bfloat16",
        "auto_map": {"A": "evil.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    train = {"steps": 1, "lr": 1e-3, "global_batch": 1}
    job = Job(model={"hf": str(tmp_path)}, data={"seq_len": 8, "tokenizer": "bytes"}, train=train)
    written = {name: json.loads(text) for name, text in model_of_job(job, 259).side_files.items()}
    assert written["generation_config.json"] == said, "259 is among them"
    assert written["config.json"]["pad_token_id"] == 7 and written["config.json"]["initializer_range"] == 0.5
    assert written["config.json"]["torch_dtype"] == "float32"
    assert not written["config.json"].keys() & {"dtype", "auto_map"}
    generation = json.loads(model_of_job(job, 256).side_files["generation_config.json"])
    assert generation == {**said, "eos_token_id": [257, 259, 256]}
    (tmp_path / "generation_config.json").unlink()
    generation = json.loads(model_of_job(job, 256).side_files["generation_config.json"])
    assert generation["eos_token_id"] == [9, 256]


@pytest.mark.parametrize(("config", "layout"), FOLDERS)
def test_a_folder_of_transformers_trains_and_comes_back(config: Any, layout: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} green bottles hanging on the wall" for n in range(300)))
    job = Job(
        model={"hf": str(tmp_path / "hf")},
        data={"source": str(tmp_path / "text.txt"), "seq_len": 32, "tokenizer": "bytes", "held_out": 0.1},
        train={"steps": 4, "lr": 1e-3, "global_batch": 4, "precision": "fp32", "compile": False},
        layout={**layout, "micro_batch": 2},
        cluster={"devices": 2},
    )
    verbs.train(job, run=tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    first = run.steps()[0]
    batch = {name: torch.as_tensor(array) for name, array in Manifest.open(run.manifest).batch(0, 0, 4, 0, 4).items()}
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-5)

    folder = run.checkpoints / "step-4" / "model"
    back = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(back) is type(model)
    from meshwright.families.llama.card import hf_names, shape_from_hf
    from meshwright.families.llama.module import build

    shape = shape_from_hf(back.config.to_dict())
    assert shape == shape_from_hf(config.to_dict())
    ours, weights, names = build(shape), back.state_dict(), hf_names(shape)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[names[name]])
        ids = batch["input_ids"]
        torch.testing.assert_close(back(ids).logits, ours(ids, torch.arange(32).expand(4, -1)), rtol=1e-4, atol=1e-4)
        moved = (back(ids).logits - logits).abs().max()
    assert moved > 1e-3, "training changed the weights"
    held_out = Manifest.open(run.manifest).held_out(0, 4)
    targets = torch.as_tensor(held_out["targets"])
    with torch.no_grad():
        found = F.cross_entropy(
            back(torch.as_tensor(held_out["input_ids"])).logits.flatten(0, 1), targets.flatten(), ignore_index=-100
        )
    assert found.item() < expected.item(), "it is the trained model that was written"
