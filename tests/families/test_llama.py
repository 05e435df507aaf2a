"""The Llama family on paper and in torch, beside transformers."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshwright import families
from meshwright.errors import InputError, Problem
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
    "llama, rope yarn, zeros": (
        "LlamaConfig",
        rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.0, beta_fast=0),
    ),
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


FULL = "full_attention"
#: What a config says instead, and what the error says.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"model_type": "gpt2"}, ["model_type 'gpt2'", "known: llama"]),
    ({"mlp_bias": True}, ["mlp_bias"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", 'supported: "silu"']),
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
    ({"rope_scaling": {"type": "yarn", "factor": 8, "mscale": False}}, ["rope_scaling: mscale must be a number"]),
    ({"rope_scaling": {"type": "yarn", "factor": 8, "attention_factor": 0.0}}, ["attention_factor must be a number"]),
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
    ({"rms_norm_ep": 1e-5}, ["'rms_norm_ep' is not a key that we know", "did you mean 'rms_norm_eps'?"]),
    ({"tie_word_embedding": True}, ["did you mean 'tie_word_embeddings'?"]),
    ({"residual_multiplier": 0.2}, ["'residual_multiplier' is not a key that we know", "leave it out"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config {'bits': 4} is not supported; supported: null"]),
    ({"use_mrope": True}, ["use_mrope True is not supported; supported: false"]),
    ({"pruned_heads": {"0": [1]}}, ["pruned_heads {'0': [1]} is not supported; supported: {}"]),
    ({"model_type": "mistral", "attention_bias": True}, ["attention_bias is true, which a mistral cannot be"]),
    ({"model_type": "qwen2", "attention_bias": False}, ["attention_bias is false, which a qwen2 cannot be"]),
    ({"layer_types": ["full_attention"]}, ["layer_types has 1 layers of 2"]),
    ({"layer_types": ["full_attention", "conv"]}, ["layer_types has 'conv', which is not supported"]),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        ["layer_types has 'sliding_attention', but no sliding_window is used"],
    ),
]


@pytest.mark.parametrize(
    ("change", "says"), REFUSED, ids=lambda value: "+".join(value) if isinstance(value, dict) else ""
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], says: list[str]) -> None:
    config = {"model_type": "llama", "hidden_act": "silu", **SMALL, **change}
    with pytest.raises(InputError) as refused:
        shape_from_hf(config, "folder/config.json")
    for words in ["folder/config.json", *says]:
        assert words in str(refused.value)


def follow(config: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The config changed as the hint of `problem` says."""
    config = copy.deepcopy(config)
    table = problem.where.rpartition(": ")[2]
    at = config.get(table, config)
    key, hint = problem.what.split()[0].strip("'"), problem.nearest
    if meant := re.match(r"did you mean '(\w+)'", hint):
        at[meant.group(1)] = at.pop(key)
    elif named := re.match(r"(?:nearest: |such as )(\w+) ?= ?([\d.]+)", hint):
        at[named.group(1)] = json.loads(named.group(2))
    elif value := re.match(r"(?:nearest|supported|known|such as):? ([^\s,]+)", hint):
        word = value.group(1)
        found = json.loads(word) if re.match(r'[\d"{]|true|false|null', word) else word
        at[key] = [found] * SMALL["num_hidden_layers"] if isinstance(at.get(key), list) and found in FULL else found
    elif hint == "give one of these tables":
        config.pop("rope_scaling")
    elif hint == "write it there":
        config["rope_scaling"][key] = config.pop(key)
    elif hint.startswith(("leave it out", "give one of them")):
        at.pop(key)
    else:
        assert hint == "take the model's own"
        at[key] = 120
    return config


@pytest.mark.parametrize("change", [change for change, _ in REFUSED], ids="+".join)
def test_a_hint_for_a_config_leads_out_of_the_problem(change: dict[str, Any]) -> None:
    config = {"model_type": "llama", "hidden_act": "silu", **SMALL, **change}
    for _ in range(8):
        try:
            shape_from_hf(config)
        except InputError as error:
            before, config = config, follow(config, error.problems[0])
            assert config != before
        else:
            return
    raise AssertionError(f"eight hints were followed, and something is wrong still: {config}")


#: The keys of published models, with their kind of values.
LLAMA_KEYS: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"},
    **{"initializer_range": 0.02, "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    **{"torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 1": {
        **{**LLAMA_KEYS, "max_sequence_length": 2048, "pad_token_id": -1, "_name_or_path": "x"},
        **{"transformers_version": "4.27.0.dev0"},
    },
    "llama 2": {**LLAMA_KEYS, "_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1, "rope_scaling": None},
    "llama 3.1": {
        **{**LLAMA_KEYS, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1},
        **{"eos_token_id": [1, 8, 9], "rope_theta": 500000.0, "torch_dtype": "bfloat16", "head_dim": 64},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 32,
        },
    },
    "smollm": {
        **{**LLAMA_KEYS, "is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2, "rope_theta": 10000.0},
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "attention_bias": False},
    },
    "unsloth": {**LLAMA_KEYS, "unsloth_fixed": True, "unsloth_version": "2024.12.4", "pad_token_id": 4},
    "deepseek-coder": {**LLAMA_KEYS, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
    "mistral 0.1": {
        **{**LLAMA_KEYS, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
        "rope_theta": 10000.0,
    },
    "mistral nemo": {
        **{**LLAMA_KEYS, "model_type": "mistral", "sliding_window": None, "head_dim": 16, "attention_dropout": 0.0},
        "rope_theta": 1000000.0,
    },
    "qwen2.5": {
        **{**LLAMA_KEYS, "model_type": "qwen2", "attention_dropout": 0.0, "max_window_layers": 2, "use_mrope": False},
        **{"sliding_window": 64, "use_sliding_window": False, "rope_theta": 1000000.0},
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
    },
    "qwen3": {
        **{**LLAMA_KEYS, "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16},
        **{"max_window_layers": 2, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000},
    },
    "written by transformers 4 in full": {
        **{**LLAMA_KEYS, "return_dict": True, "output_hidden_states": False, "output_attentions": False},
        **{"torchscript": False, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}},
        **{"chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False, "max_length": 20},
        **{"cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False},
        **{"min_length": 0, "do_sample": True, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1},
        **{"diversity_penalty": 0.0, "temperature": 0.9, "top_k": 50, "top_p": 0.6, "typical_p": 1.0},
        **{"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None},
        **{"encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "output_scores": False},
        **{"return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None},
        **{"remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None},
        **{"begin_suppress_tokens": None, "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
        **{"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "tokenizer_class": None, "prefix": None, "pad_token_id": None},
        **{"sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    shape = shape_from_hf({**SMALL, **PUBLISHED[name]})
    assert (shape.layers, shape.hidden, shape.vocab) == tuple(
        SMALL[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")
    )


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("use_diff", [True, False])
def test_what_transformers_writes_is_read(kind: str, use_diff: bool) -> None:
    transformers = pytest.importorskip("transformers")
    configs = getattr(transformers, f"{kind}Config")
    more = {"num_labels": 3, "dtype": "bfloat16", "output_attentions": True, "pad_token_id": 3, "use_cache": False}
    for config in (configs(), configs(**SMALL, **more)):
        written = json.loads(config.to_json_string(use_diff=use_diff))
        assert shape_from_hf(written).hidden == config.hidden_size


#: kind, its config, and the longest sequence that ours takes
WINDOWS: list[tuple[str, dict[str, Any], int]] = [
    ("mistral", {"sliding_window": 24}, 24),
    ("mistral", {"sliding_window": 24, "use_sliding_window": False}, 24),
    ("mistral", {"sliding_window": None}, 128),
    ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1}, 24),
    ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2}, 128),
    ("qwen2", {"sliding_window": 24, "use_sliding_window": False, "max_window_layers": 0}, 128),
    ("qwen3", {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 128),
    (
        "qwen3",
        {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        24,
    ),
    ("llama", {"sliding_window": 24}, 24),
    ("llama", {"sliding_window": 24, "use_sliding_window": False}, 128),
]


@pytest.mark.parametrize(("kind", "more", "longest"), WINDOWS)
def test_a_window_is_a_limit_where_the_class_has_one(kind: str, more: dict[str, Any], longest: int) -> None:
    """Up to the limit the logits are those of transformers, whatever windows it uses; past it they differ, or there is
    nothing past it."""
    transformers = pytest.importorskip("transformers")
    config = {"model_type": kind, **SMALL, **more}
    torch.manual_seed(1)
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    shape = shape_from_hf(config)
    assert shape.longest == longest
    ours, weights, names = build(shape), model.state_dict(), hf_names(shape)
    ids, positions = torch.randint(0, shape.vocab, (1, 128)), torch.arange(128)[None]
    with torch.no_grad():
        for own, parameter in ours.named_parameters():
            parameter.copy_(weights[names[own]] * 3)
            weights[names[own]].copy_(parameter)
        found, expected = ours(ids, positions), model(ids).logits
    torch.testing.assert_close(found[:, :longest], expected[:, :longest], rtol=1e-4, atol=1e-4)
    if longest < 128 and kind != "llama":  # whose class has none, but the folder asks for one
        assert (found[:, longest + 1 :] - expected[:, longest + 1 :]).abs().max() > 1e-3


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
