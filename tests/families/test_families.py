"""What a job's model is, for every kind that can be planned, and which of them are trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from meshwright import families
from meshwright.errors import CannotWork, InputError
from meshwright.families.llama import card as llama
from meshwright.families.llama.module import build
from meshwright.job import Job, load_job
from meshwright.nn import blocked
from meshwright.plan.cost.block_memory import saved_bytes

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "vocab_size": 200,
    "max_position_embeddings": 64,
}
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 2}
MIXTRAL = {**CONFIG, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def job_of(folder: Path, config: dict[str, Any]) -> Job:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "job.toml").write_text(
        f'[model]\nhf = "{folder}"\n[data]\nsource = "text"\nseq_len = 32\n'
        "[train]\nsteps = 1\nlr = 1e-3\nglobal_batch = 2\n"
    )
    return load_job(folder / "job.toml", [], data_must_exist=False)


def test_a_mixture_of_experts_has_a_card_and_is_not_trained(tmp_path: Path) -> None:
    job = job_of(tmp_path, MIXTRAL)
    card = families.card_of_job(job)
    assert [block.kind for block in card.blocks] == ["embedding", "moe", "moe", "head"]
    with pytest.raises(CannotWork, match=r"is a mixtral, which can be planned and not trained; trained are llama"):
        families.require_trainable(job)


def test_a_family_of_ours_is_both(tmp_path: Path) -> None:
    job = job_of(tmp_path, {**CONFIG, "model_type": "llama"})
    families.require_trainable(job)
    assert families.card_of_job(job) == llama.card(families.shape_of_job(job), 32)


def test_dropout_of_a_folder_is_refused_in_training_alone(tmp_path: Path) -> None:
    for dropout in (0, 0.0, None):
        families.require_trainable(job_of(tmp_path, {**CONFIG, **QWEN3, "attention_dropout": dropout}))
    job = job_of(tmp_path, {**CONFIG, **QWEN3, "attention_dropout": 0.1})
    assert families.card_of_job(job).parameters
    with pytest.raises(CannotWork, match=r"attention_dropout 0.1, and we train without dropout; set it to 0"):
        families.require_trainable(job)


@pytest.mark.parametrize(
    ("said", "not_followed"),
    [
        ({"eos_token_id": 4, "bos_token_id": 1, "pad_token_id": 7, "transformers_version": "4.44.0"}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {}),  # as in transformers, without do_sample
        ({"do_sample": True, "temperature": 0.6, "top_p": 1.0}, {"temperature": 0.6}),
        (
            {"repetition_penalty": 1.1, "num_beams": 1, "max_length": 4096},
            {"repetition_penalty": 1.1, "max_length": 4096},
        ),
        ({"_from_model_config": True, "unheard_of": 3, "bad_words_ids": None}, {"unheard_of": 3}),
    ],
)
def test_what_a_folder_says_of_sampling_is_known(
    tmp_path: Path, said: dict[str, Any], not_followed: dict[str, Any]
) -> None:
    assert families.sampling_settings(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert families.sampling_settings(tmp_path) == not_followed


def test_another_framework_keeps_other_activations_of_the_same_model(tmp_path: Path) -> None:
    job = job_of(tmp_path, {**CONFIG, "model_type": "qwen2", "num_key_value_heads": 2})
    ours, theirs = families.card_of_job(job), families.card_of_job(job, "megatron")
    assert theirs.parameters == ours.parameters
    assert theirs.forward_flops == ours.forward_flops
    assert theirs.blocks[1].saved != ours.blocks[1].saved


def test_a_kind_that_nobody_knows_is_an_input_error(tmp_path: Path) -> None:
    job = job_of(tmp_path, {**CONFIG, "model_type": "word2vec"})
    with pytest.raises(InputError, match="not a decoder that we know"):
        families.card_of_job(job)
    families.require_trainable(job)  # the other error says more


def test_the_card_knows_the_numbers_of_the_blocked_attention() -> None:
    assert (llama.QUERIES_AT_ONCE, llama.PROBABILITIES_KEPT) == (blocked.QUERIES_AT_ONCE, blocked.KEPT_LENGTH)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("length", [200, 640])
def test_a_layer_keeps_what_autograd_keeps(length: int, kv_heads: int, precision: str) -> None:
    """The card's list for a CPU, to the byte."""
    import torch

    shape = llama.LlamaShape(layers=1, hidden=64, heads=8, kv_heads=kv_heads, head_dim=8, ffn=96, vocab=100)
    module = build(shape).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.setdefault(storage.data_ptr(), tensor)
        return tensor

    hidden = module.blocks["embed"](torch.zeros(2, length, dtype=torch.long), positions=None).detach()
    positions = torch.arange(length).expand(2, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.blocks["head"](module.blocks["0"](hidden.requires_grad_(), positions=positions), positions=positions)
    card = llama.card(shape, length)
    said = [
        2 * saved_bytes(saved, tp=1, sequence_parallel=False, precision=precision)
        for block in card.blocks
        for saved in block.saved
        if saved.on in ("", "cpu", f"cpu {precision}") and saved.module != "loss"
    ]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == sum(said)


def test_a_config_says_shape_precision_and_numbers_of_any_decoder(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    more = {"rope_parameters": {"rope_theta": 5e5, **scaling}, "rms_norm_eps": 1e-5}
    for kind, longest, bias_of in (("qwen2", 64, ("qkv",)), ("phi3", 4096, ())):
        config = {**CONFIG, **more, "model_type": kind, "dtype": "bfloat16", "num_key_value_heads": 2}
        if kind == "phi3":
            del config["max_position_embeddings"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = families.config_of_folder(tmp_path)
        assert (read.precision, read.longest, read.rope_theta, read.norm_eps) == ("bf16", longest, 5e5, 1e-5)
        assert read.rope_scaling == scaling and read.shape.bias_of == bias_of
        assert read.shape in {read.shape}, "a shape with a table of scaling can be a key"
    with pytest.raises(InputError, match="'phi3' is not one of ours"):
        families.config_of_folder(tmp_path, ours=True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a regular file"):
        families.config_of_folder(tmp_path)
