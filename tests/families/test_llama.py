"""The Llama family on paper and in torch, beside transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshwright import families
from meshwright.errors import InputError
from meshwright.families.decoder import parameters
from meshwright.families.llama.card import LlamaShape, card, hf_config, hf_names, shape_from_hf
from meshwright.families.llama.module import build
from meshwright.job import Job

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 120,
    "max_position_embeddings": 128,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


#: transformers' config class, what differs from SMALL
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, attention bias": ("LlamaConfig", {"attention_bias": True}),
    "llama, one key head": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama, head_dim": ("LlamaConfig", {"head_dim": 20}),
    "llama, rope linear": ("LlamaConfig", rope("linear", factor=4.0)),
    "llama, rope llama3": (
        "LlamaConfig",
        rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama, rope yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 20, "tie_word_embeddings": True}),
}


def theirs(name: str) -> Any:
    """A small model of transformers, with every parameter away from its special first value."""
    transformers = pytest.importorskip("transformers")
    kind, more = MODELS[name]
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SMALL, **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str) -> None:
    model = theirs(name)
    shape = shape_from_hf(model.config.to_dict())
    ours = build(shape)
    weights, names = model.state_dict(), hf_names(shape)
    with torch.no_grad():
        for own, parameter in ours.named_parameters():
            parameter.copy_(weights[names[own]])
    ids = torch.randint(0, shape.vocab, (2, 70))
    positions = torch.arange(70).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, positions), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_card_lists_what_the_module_has(name: str) -> None:
    model = theirs(name)
    shape = shape_from_hf(model.config.to_dict())
    with torch.device("meta"):
        module = build(shape)
    has = {own: tuple(parameter.shape) for own, parameter in module.named_parameters()}
    assert {parameter.name: parameter.shape for parameter in parameters(shape)} == has
    assert [parameter.name for parameter in parameters(shape)] == list(has), "the table is in module order"
    paper = card(shape, 32)
    assert paper.parameters == parameters(shape)
    assert [block.name for block in paper.blocks] == list(module.blocks)
    stored = {key for key in model.state_dict() if not (shape.tied and key == "lm_head.weight")}
    assert set(hf_names(shape).values()) == stored
    assert set(hf_names(shape)) == set(has)
    assert paper.parameter_elements == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_config_goes_round(name: str) -> None:
    from transformers import AutoConfig

    shape = shape_from_hf(theirs(name).config.to_dict())
    text = json.dumps(hf_config(shape))
    assert shape_from_hf(json.loads(text)) == shape
    read = AutoConfig.for_model(**json.loads(text))
    again = shape_from_hf(read.to_dict())
    assert again == shape


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("hidden", [32, 36])
def test_every_shape_of_a_job_is_one_that_transformers_builds(hidden: int, attention_bias: bool, qk_norm: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"layers": 1, "hidden": hidden, "heads": 8, "kv_heads": 4, "head_dim": 8, "ffn": 40, "vocab": 50}
    job = Job(
        model={"family": "llama", **sizes, "qk_norm": qk_norm, "attention_bias": attention_bias},
        data={"source": "stdlib", "seq_len": 16},
        train={"steps": 1, "lr": 1e-3, "global_batch": 1},
    )
    shape = families.shape_of_job(job)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config(shape)))
    has = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {hf_names(shape)[parameter.name]: parameter.shape for parameter in parameters(shape)} == has


def test_parameters_and_flops_by_hand() -> None:
    shape = LlamaShape(layers=3, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=20, vocab=50)
    paper = card(shape, seq_len=16)
    attention = 8 * 8 + 2 * (4 * 8) + 8 * 8
    layer = attention + 3 * (8 * 20) + 2 * 8
    assert paper.parameter_elements == 50 * 8 + 3 * layer + 8 + 8 * 50
    # A product of an [16 x n] by an [n x m] matrix takes 2 x 16 x n x m; scores and values 4 x T^2 x 8, half causal.
    flops = 3 * (2 * 16 * (attention + 3 * 8 * 20) + 4 * 16 * 16 * 8 // 2) + 2 * 16 * 8 * 50
    assert paper.forward_flops == flops
    assert paper.unit == "tokens" and paper.units_per_sample == 16


def test_a_tied_head_is_counted_once() -> None:
    sizes: dict[str, Any] = {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "ffn": 8, "vocab": 50}
    tied, untied = card(LlamaShape(**sizes, tied=True), 4), card(LlamaShape(**sizes), 4)
    assert untied.parameter_elements - tied.parameter_elements == 50 * 8
    assert tied.tied == (("blocks.embed.weight", "blocks.head.out.weight"),)
    assert tied.forward_flops == untied.forward_flops
    module = build(LlamaShape(**sizes, tied=True))
    assert module.get_parameter("blocks.head.out.weight") is module.get_parameter("blocks.embed.weight")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, ["model_type 'gpt2'", "known: llama"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "supported: silu"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["needs a factor"]),
        ({"hidden_act": "gelu", "mlp_bias": True, "hidden_size": -1}, ["hidden_act", "mlp_bias", "hidden_size"]),
        ({"model_type": ["llama"]}, ["model_type must be text, found ['llama']"]),
        ({"head_dim": 5}, ["head_dim must be even for rotary positions, not 5; nearest: head_dim=6"]),
        ({"head_dim": -5}, ["head_dim", "found -5; nearest: 2, or leave it out for 12"]),
        ({"num_attention_heads": 5}, ["num_key_value_heads 2 does not divide num_attention_heads 5", "heads=1, or "]),
        (
            {"num_attention_heads": 5},
            ["5 does not divide hidden_size 48; nearest: num_attention_heads=4, or give head"],
        ),
        (
            {"num_key_value_heads": 3},
            ["num_key_value_heads 3 does not divide", "nearest: num_key_value_heads=2, or num"],
        ),
        (
            {"num_key_value_heads": 8},
            ["num_key_value_heads 8 does not divide", "nearest: num_key_value_heads=4, or num"],
        ),
        ({"num_key_value_heads": 0}, ["num_key_value_heads", "found 0; nearest: 1, or leave it out for 4"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers must be at most 10000", "nearest: 10000"]),
        ({"rms_norm_eps": "x"}, ["rms_norm_eps must be a number above 0", "found 'x'; such as 1e-06"]),
        ({"rope_theta": 0}, ["rope_theta must be a number above 0", "found 0; such as 10000"]),
        ({"rope_scaling": "x"}, ["rope_scaling must be an object, found 'x'"]),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
            ["rope_scaling: factor must be a number", "such as 8"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor", "high_freq_factor", "not there"]),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 8}}, ["rope_type ['yarn'] is not supported; known: def"]),
        ({"rope_scaling": {"type": "yarn", "factor": 8, "mscale": "x"}}, ["rope_scaling: mscale must be a number"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "low_freq_factor": 1.0, "turn": 2}},
            ["rope_scaling: 'low_freq_factor' is not a key of rope_type 'yarn'", "'turn' is not a key"],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 8.0}},
            ["'factor' is not a key of rope_type 'default'"],
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5 is not supported"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}, "original_max_position_embeddings": 32},
            ["original_max_position_embeddings is 32 beside 128 of the rope table"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5 is not supported"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": {"type": "linear", "factor": 4.0}},
            ["factor is 8.0 in rope_scaling and 4.0 in rope_parameters; give one of these tables"],
        ),
        ({"rope_theta": 10.0, "rope_parameters": {"rope_theta": 20.0}}, ["rope_theta is 10.0, but 20.0 in rope_p"]),
        ({"rope_parameters": {"rope_theta": "x"}}, ["rope_parameters: rope_theta must be a number"]),
        ({"max_position_embeddings": -1}, ["max_position_embeddings must be a positive whole number, found -1"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings must be true or false, found 'yes'"]),
        ({"model_type": "mistral", "sliding_window": -1}, ["sliding_window must be a positive whole number"]),
        ({"eos_token_id": "x"}, ["eos_token_id must be a token id or a list of them, found 'x'"]),
        ({"bos_token_id": [1]}, ["bos_token_id must be a token id, found [1]"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], says: list[str]) -> None:
    config = {"model_type": "llama", "hidden_act": "silu", **SMALL, **change}
    with pytest.raises(InputError) as refused:
        shape_from_hf(config, "folder/config.json")
    for words in ["folder/config.json", *says]:
        assert words in str(refused.value)


def test_a_sequence_longer_than_the_models_positions_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))

    def job(seq_len: int) -> Any:
        return SimpleNamespace(model=SimpleNamespace(hf=str(tmp_path)), data=SimpleNamespace(seq_len=seq_len))

    assert families.shape_of_job(job(128)).max_positions == 128
    with pytest.raises(InputError, match=r"data\.seq_len: 129 is more than the 128.*nearest: data\.seq_len=128"):
        families.shape_of_job(job(129))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **SMALL, "sliding_window": 64}))
    assert families.shape_of_job(job(64)).sliding_window == 64
    with pytest.raises(InputError, match=r"65 is more than the 64 tokens of the sliding window"):
        families.shape_of_job(job(65))


@pytest.mark.parametrize("content", ["", "[1]", "{" * 100_000, "not json"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Any, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        families.read_config(tmp_path / "config.json")


def test_first_values_follow_the_rule() -> None:
    module = build(LlamaShape(layers=8, hidden=8, heads=2, kv_heads=2, head_dim=4, ffn=8, vocab=16, bias_of=("qkv",)))
    rules = {name: module.init_rule(name) for name, _ in module.named_parameters()}
    assert rules["blocks.0.attn.q.weight"] == ("normal", 0.02)
    assert rules["blocks.0.attn.o.weight"] == rules["blocks.7.ffn.down.weight"] == ("normal", 0.02 / 4)
    assert rules["blocks.0.attn.q.bias"] == ("constant", 0.0)
    assert rules["blocks.head.norm.weight"] == rules["blocks.3.ffn_norm.weight"] == ("constant", 1.0)
