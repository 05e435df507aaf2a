"""A resume compares the model with that of its checkpoint by what they say, wherever the folder lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.errors import InputError
from meshwright.job import Job
from meshwright.train.model import Model, model_of_job
from meshwright.train.same_model import refuse_other_model, source_changed

CONFIG: dict[str, Any] = {
    **{"model_type": "mistral", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 300, "max_position_embeddings": 64},
}
TRAIN = {"steps": 1, "lr": 1e-3, "global_batch": 1}
NET = """\
import torch
class Net(torch.nn.Linear):
    def sample_input(self):
        return torch.zeros(1, 8)
def build():
    return Net(8, 10)
"""


def hf_model(folder: Path, **more: Any) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **more}))
    return model_of_job(Job(model={"hf": str(folder)}, data={"seq_len": 8, "tokenizer": "bytes"}, train=TRAIN), 256)


def checkpoint_of(folder: Path, model: Model) -> Path:
    (folder / "model").mkdir(parents=True)
    for name, content in model.side_files.items():
        (folder / "model" / name).write_bytes(content)
    return folder


def test_another_config_is_refused_by_its_keys(tmp_path: Path) -> None:
    step = checkpoint_of(tmp_path / "step-1", hf_model(tmp_path / "here"))
    for more in ({}, {"eos_token_id": 7, "pad_token_id": 3, "dtype": "bfloat16"}, {"rope_theta": 10000.0}):
        refuse_other_model(hf_model(tmp_path / "there", **more), "there/config.json", step)
    with pytest.raises(InputError) as refused:
        refuse_other_model(
            hf_model(tmp_path / "there", rms_norm_eps=1e-3, sliding_window=32), "there/config.json", step
        )
    first, second = str(refused.value).split("\n")
    assert first.startswith("there/config.json: rms_norm_eps is 0.001, but 1e-06 in ") and "bring it back" in first
    assert "sliding_window is 32, but 4096 in" in second


def test_another_source_of_a_module_is_known_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "net_of_this_test.py").write_text(NET)
    sections = {"module": "net_of_this_test:build", "module_folder": str(tmp_path)}
    job = Job(model=sections, data={"source": "digits"}, train=TRAIN)
    step = checkpoint_of(tmp_path / "step-1", model_of_job(job, None))
    refuse_other_model(model_of_job(job, None), "", step)
    assert not source_changed(model_of_job(job, None), step)
    (tmp_path / "net_of_this_test.py").write_text(NET + "# mended\n")
    assert source_changed(model_of_job(job, None), step)
    assert not source_changed(hf_model(tmp_path / "hf"), step)


def test_a_checkpoint_that_names_no_digest_does_not_tell_of_a_change(tmp_path: Path) -> None:
    (tmp_path / "undigested_net.py").write_text(NET)
    sections = {"module": "undigested_net:build", "module_folder": str(tmp_path)}
    model = model_of_job(Job(model=sections, data={"source": "digits"}, train=TRAIN), None)
    step = checkpoint_of(tmp_path / "step-1", model)
    record = json.loads(model.side_files["module.json"])
    assert record.pop("sha256")
    (step / "model" / "module.json").write_text(json.dumps(record))
    assert not source_changed(model, step)
