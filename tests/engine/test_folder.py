"""Which folders the engine opens, and which it refuses, running nothing that is in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.engine import Engine
from meshwright.errors import InputError


def copy(folder: Path, to: Path, **config: object) -> Path:
    shutil.copytree(folder, to)
    record = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**record, **config}))
    return to


def test_a_folder_of_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    copy(llama, tmp_path / "step-3" / "model")
    with Engine.open(tmp_path / "step-3") as engine:
        assert engine.folder == tmp_path / "step-3" / "model" and engine.max_len == 256


def test_code_in_the_folder_is_never_run(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "hostile", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.C"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with Engine.open(folder) as engine:
        assert len(list(engine.generate([[1, 2, 3]], max_tokens=2))) == 2
    assert not (tmp_path / "ran").exists()


def test_an_unknown_model_type_names_the_known(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="llama, mistral, qwen2, qwen3"):
        Engine.open(copy(llama, tmp_path / "other", model_type="mamba"))


def test_pickled_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        Engine.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', '{"model_type": 3}'])
def test_a_broken_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json"):
        Engine.open(tmp_path)


def test_weights_of_another_shape_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shape"):
        Engine.open(copy(llama, tmp_path / "wider", intermediate_size=128))


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config.json"):
        Engine.open(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        Engine.open(tmp_path / "missing")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no checkpoint is committed yet"):
        Engine.open(tmp_path)


def test_wrong_arguments(llama: Path) -> None:
    with pytest.raises(InputError, match=r"precision.*known: auto, bf16, fp32"):
        Engine.open(llama, precision="int4")
    with pytest.raises(InputError, match="max_batch"):
        Engine.open(llama, max_batch=0)
    with pytest.raises(InputError, match="300 is more than the model takes: it has 256 positions; at most 256"):
        Engine.open(llama, max_len=300)


def test_a_sliding_window_is_a_limit(folder_of: Callable[[str], Path]) -> None:
    with Engine.open(folder_of("mistral")) as engine:
        assert engine.max_len == 200
    with pytest.raises(InputError, match="its sliding window is 200 tokens; at most 200"):
        Engine.open(folder_of("mistral"), max_len=201)


def test_end_of_sequence_ids_come_from_the_generation_config(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(llama, tmp_path / "ends", eos_token_id=4)
    (folder / "generation_config.json").unlink()
    with Engine.open(folder) as engine:
        assert engine.eos_ids == {4}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "do_sample": true, "top_k": 20}')
    with Engine.open(folder) as engine:
        assert engine.eos_ids == {5, 6}
    assert [message for message in caplog.messages if "top_k 20; requests say" in message]
