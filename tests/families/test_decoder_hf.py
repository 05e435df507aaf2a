"""Shapes read from Hugging Face configs, against the models that `transformers` builds from them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import families
from meshwright.errors import CannotWork, InputError
from meshwright.families.decoder import card, parameters
from meshwright.families.decoder_config import CLASS_DEFAULTS, EPSILONS
from meshwright.families.decoder_hf import KINDS, numbers_of, shape_from_hf_config

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "vocab_size": 200,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = {"num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 50}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
OPT = {"ffn_dim": 128, "max_position_embeddings": 50, "word_embed_proj_dim": 64}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}

#: (kind, what its config says beside BASE): at least one of each, and more where a config decides what is computed.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", KV),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16}),
    ("mistral", KV),
    ("qwen2", {**KV, "tie_word_embeddings": True}),
    ("qwen3", {**KV, "head_dim": 16}),
    ("qwen3", {**KV, "head_dim": 8, "attention_bias": True}),
    ("mixtral", {**KV, **LOCAL}),
    ("qwen2_moe", {**KV, **MOE, "shared_expert_intermediate_size": 48}),
    ("qwen2_moe", {**KV, **MOE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2}),
    ("qwen3_moe", {**KV, **MOE, "head_dim": 16}),
    ("qwen3_moe", {**MOE, "mlp_only_layers": [0, 1]}),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 24}),
    ("gpt2", {**GPT, "n_inner": None}),
    ("gpt2", {**GPT, "n_inner": 100, "tie_word_embeddings": False}),
    ("gpt_neox", {}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neo", {"num_layers": 4, "num_heads": 8, "attention_types": [[["global", "local"], 2]]}),
    ("gptj", {**GPT, "rotary_dim": 4}),
    ("gpt_bigcode", GPT),
    ("gpt_bigcode", {**GPT, "multi_query": False}),
    ("gpt_oss", {**KV, **LOCAL, "head_dim": 16}),
    ("opt", OPT),
    ("opt", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt", {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("falcon", {}),
    ("falcon", FALCON),
    ("falcon", {**FALCON, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True, "alibi": True}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    ("gemma2", {**KV, "head_dim": 16}),
    ("gemma3_text", {**KV, "head_dim": 16}),
    ("phi", {}),
    ("phi3", KV),
    ("mpt", {"d_model": 64, "n_layers": 4, "n_heads": 8}),
    ("bloom", {"n_layer": 4, "n_head": 8}),
    ("olmo", KV),
    ("olmo2", KV),
    ("olmoe", {**KV, "num_experts": 4, "num_experts_per_tok": 2}),
    ("starcoder2", KV),
    ("stablelm", {**KV, "use_qkv_bias": True, "use_parallel_residual": True}),
    ("stablelm", KV),
    ("granite", KV),
    ("cohere", KV),
    ("nemotron", KV),
]
#: Gemma 3's full config has a picture part beside the text that a shape is of.
WITHOUT_A_MODEL_OF_THEIR_OWN = {"gemma3"}


def test_every_kind_is_tried() -> None:
    assert {kind for kind, _ in CONFIGS} == set(KINDS) - WITHOUT_A_MODEL_OF_THEIR_OWN


@pytest.mark.parametrize(("kind", "extra"), CONFIGS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_a_shape_has_as_many_parameters_as_the_real_model(kind: str, extra: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **{**BASE, **extra})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    written = json.loads(config.to_json_string(use_diff=False))
    found = parameters(shape_from_hf_config(written))
    assert sum(p.elements for p in found) == sum(p.numel() for p in model.parameters())


#: Keys of CONFIGS that a class may have a default for.
_LEFT_OUT = (
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "n_routed_experts",
    "n_shared_experts",
    "tie_word_embeddings",
)
_LEFT_OUT = (*_LEFT_OUT, "first_k_dense_replace", "shared_expert_intermediate_size")


@pytest.mark.parametrize("kind", sorted(dict(CONFIGS)))
def test_a_key_that_is_left_out_is_its_classs_default(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 1024, "num_attention_heads": 64, "num_hidden_layers": 4}
    full = {**BASE, **dict(CONFIGS)[kind], **sizes}
    full |= {"n_embd": 1024, "n_head": 64, "d_model": 1024}
    for key in [key for key in full if key in _LEFT_OUT and kind != "nemotron"]:  # Nemotron's class cannot
        config = {name: value for name, value in full.items() if name != key}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
        found = sum(p.elements for p in parameters(shape_from_hf_config({"model_type": kind, **config})))
        assert found == sum(p.numel() for p in model.parameters()), key


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_left_out_are_the_classs(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind)
    theirs = config.get_text_config()
    _, longest, theta, _, eps = numbers_of({"model_type": kind}, "config.json")
    positions = getattr(theirs, "max_position_embeddings", longest)
    if kind not in ("gpt2", "gpt_neo", "gpt_bigcode", "opt"):  # these must say it
        assert longest == positions
    rope = getattr(theirs, "rope_parameters", None) or {}
    assert theta == rope.get("rope_theta", theta)
    assert eps in {getattr(theirs, key, eps) for key in EPSILONS}
    for key, value in CLASS_DEFAULTS.get(kind, {}).items():
        fresh = {**vars(type(theirs)), **theirs.to_dict(), **rope}
        assert key == "sliding_window" or fresh.get(key, value) == value, key


def test_the_text_part_says_its_own_numbers_first() -> None:
    text = {"model_type": "gemma3_text", "torch_dtype": "bfloat16", "max_position_embeddings": 77, "rms_norm_eps": 0.5}
    outer = {"model_type": "gemma3", "dtype": "float32", "max_position_embeddings": 11, "text_config": text}
    assert numbers_of(outer, "config.json")[:2] == ("bf16", 77)
    text["quantization_config"] = {"quant_method": "fp8"}
    assert numbers_of(outer, "config.json")[0] == "fp8"
    quantized = {**outer, "text_config": {"dtype": None}, "quantization_config": {"quant_method": "fp8"}}
    assert numbers_of(quantized, "config.json")[:2] == ("fp8", 11)
    del quantized["quantization_config"]
    assert numbers_of(quantized, "config.json")[0] == "fp32"


def test_the_text_part_of_a_larger_config_is_read() -> None:
    inside = {**BASE, **KV, "model_type": "gemma3_text", "head_dim": 16}
    shape = shape_from_hf_config({"model_type": "gemma3", "text_config": inside})
    assert (shape.layers, shape.norms, shape.hf_type) == (4, 4, "gemma3_text")


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"did you mean 'mixtral'.*known: llama, .*deepseek_v3"):
        shape_from_hf_config({**BASE, "model_type": "mixtra"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, found 0"),
        ({"hidden_size": "wide"}, "hidden_size must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size must be a positive whole number"),
        (
            {"num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok 3 is more than num_local_experts 2; nearest: num_experts_per_tok=2",
        ),
        ({"num_local_experts": None}, "num_local_experts must be a positive whole number, and is not there"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        shape_from_hf_config({**BASE, **LOCAL, "model_type": "mixtral", **change})


#: (kind, what its config says instead, what the error says after the file)
IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    (
        "mixtral",
        {"num_attention_heads": 7},
        "attention_heads 7; nearest: num_key_value_heads=1, or num_attention_heads=8",
    ),
    ("mixtral", {"num_attention_heads": 6}, "does not divide hidden_size 64; nearest: num_attention_heads=4, or give"),
    ("mixtral", {"num_key_value_heads": 5}, "does not divide num_attention_heads 8; nearest: num_key_value_heads=4"),
    ("mixtral", {"num_key_value_heads": 32}, "does not divide num_attention_heads 8; nearest: num_key_value_heads=8"),
    (
        "mixtral",
        {"num_key_value_heads": 0},
        "must be a positive whole number, found 0; nearest: 1, or leave it out for",
    ),
    (
        "mixtral",
        {"head_dim": -5},
        "head_dim must be a whole number of at least 2, found -5; nearest: 2, or leave it out",
    ),
    ("mixtral", {"head_dim": 5}, "head_dim must be even for rotary positions, not 5; nearest: head_dim=6"),
    ("mixtral", {"hidden_size": 24}, "head_dim, hidden_size / num_attention_heads, must be even for rotary positions"),
    ("mixtral", {"head_dim": 10**11}, "head_dim must be at most 2147483647, found 100000000000; nearest: 2147483647"),
    ("mixtral", {"num_hidden_layers": 10**9}, "must be at most 10000, found 1000000000; nearest: 10000"),
    ("mixtral", {"num_hidden_layers": 4.0}, "must be a positive whole number, found 4.0; nearest: 4"),
    ("mixtral", {"num_hidden_layers": "4"}, "found '4'; nearest: 4, without quotes"),
    ("mixtral", {"num_hidden_layers": 10**5000}, "must be at most 10000, found a int; nearest: 10000"),
    ("mixtral", {"num_local_experts": "x"}, "num_local_experts must be a positive whole number, found 'x'"),
    (
        "mixtral",
        {"rms_norm_eps": "x"},
        "rms_norm_eps must be a number above 0, at most 1e+12, found 'x'; such as 1e-05",
    ),
    ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
    ("mixtral", {"tie_word_embeddings": "yes"}, "must be true or false, found 'yes'; leave it out for false"),
    ("mixtral", {"tie_word_embeddings": "True"}, "found 'True'; nearest: true, without quotes"),
    ("mixtral", {"rope_scaling": "x"}, "rope_scaling must be an object, found 'x'; leave it out"),
    ("mixtral", {"max_position_embeddings": -1}, "max_position_embeddings must be a positive whole number, found -1"),
    ("mixtral", {"sliding_window": 0}, "sliding_window must be a positive whole number, found 0"),
    ("mixtral", {"layer_types": [1]}, "layer_types must be a list of texts, found [1]; leave it out"),
    ("mixtral", {"model_type": ["mixtral"]}, "model_type must be text, found ['mixtral']"),
    ("deepseek_v3", {"first_k_dense_replace": 9}, "9 dense layers are more than num_hidden_layers 4; nearest: 4"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "must be a whole number of at least 0, found -1; nearest: 0"),
    ("deepseek_v3", {"n_shared_experts": -1}, "n_shared_experts must be a whole number of at least 0, found -1"),
    ("deepseek_v3", {"moe_layer_freq": 0}, "moe_layer_freq must be a positive whole number, found 0; nearest: 1"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank must be a positive whole number, and is not there"),
    ("deepseek_v3", {"qk_rope_head_dim": 3}, "must be even for rotary positions, not 3; nearest: qk_rope_head_dim=4"),
    ("deepseek_v3", {"num_key_value_heads": 3}, "does not divide num_attention_heads 8; nearest: num_key_value_heads="),
    ("deepseek_v3", {"num_experts_per_tok": 9}, "is more than n_routed_experts 8; nearest: num_experts_per_tok=8"),
    ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers [2] is not supported: dense layers come first"),
    ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 2}, "nearest: decoder_sparse_step=1"),
    ("qwen3_moe", {"mlp_only_layers": list(range(5))}, "5 dense layers are more than num_hidden_layers 4; nearest: 4"),
    ("falcon", {**FALCON, "num_kv_heads": 3}, "does not divide num_attention_heads 8; nearest: num_kv_heads=2"),
    ("falcon", {**FALCON, "num_ln_in_parallel_attn": 3}, "must be at most 2, found 3; nearest: 2"),
    ("mpt", {"expansion_ratio": 0}, "expansion_ratio must be a number from 1 to"),
    ("gpt2", {"n_positions": None}, "n_positions must be a positive whole number, and is not there"),
    ("gpt2", {"n_inner": 2**40}, "n_inner must be at most 2147483647"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is not supported; supported: qk_layernorm false"),
]


@pytest.mark.parametrize(("kind", "change", "said"), IMPOSSIBLE, ids=[f"{one[0]}-{one[2][:30]}" for one in IMPOSSIBLE])
def test_an_impossible_shape_is_refused(kind: str, change: dict[str, Any], said: str) -> None:
    sound = {**BASE, **KV, **LOCAL, **MOE, **(LATENT if kind == "deepseek_v3" else {}), **GPT, "model_type": kind}
    shape_from_hf_config(sound)
    with pytest.raises(InputError) as refused:
        shape_from_hf_config({**sound, **change}, "folder/config.json")
    lines = str(refused.value).split("\n")
    assert all(line.startswith("folder/config.json: ") for line in lines)
    assert any(said in line for line in lines), lines


def test_the_largest_number_of_layers_is_read_and_no_more() -> None:
    config = {**BASE, **KV, "model_type": "gemma", "num_hidden_layers": 10_000}
    assert len(card(shape_from_hf_config(config), 8).blocks) == 10_002


#: Keys that kinds read beside those of CONFIGS.
OPTIONAL = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "max_position_embeddings", "sliding_window", "use_sliding_window"),
    *("layer_types", "attention_bias", "mlp_bias", "hidden_act", "bos_token_id", "eos_token_id", "text_config"),
    *("mlp_only_layers", "decoder_sparse_step", "moe_layer_freq", "num_kv_heads", "num_ln_in_parallel_attn"),
    *("expansion_ratio", "multi_query", "q_lora_rank", "shared_expert_intermediate_size", "n_inner", "model_type"),
    *("new_decoder_architecture", "parallel_attn", "qk_layernorm", "n_layer", "d_model"),
)
INSIDE = st.sampled_from(("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "model_type", "hidden_size"))
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 40),
        st.integers(),
        st.sampled_from((2**31 - 1, 2**31, 10**4, 10**11, -(10**40), 10**400)),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(("llama", "yarn", "linear", "llama3", "sliding_attention", "8")),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INSIDE | st.text(max_size=3), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def damaged_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config of some kind with one to three values that are anything JSON can hold."""
    kind, extra = draw(st.sampled_from(CONFIGS))
    sound = {**BASE, **extra, "model_type": kind}
    keys = draw(st.lists(st.sampled_from(sorted({*sound, *OPTIONAL})), min_size=1, max_size=3, unique=True))
    return {**sound, **{key: draw(JSON) for key in keys}}


@settings(max_examples=400)
@given(config=damaged_configs(), style=st.sampled_from(("plain", "hf", "megatron", "titan")))
def test_any_config_gives_a_card_or_a_plain_error(config: dict[str, Any], style: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        job = SimpleNamespace(
            model=SimpleNamespace(hf=folder, module=None), data=SimpleNamespace(source="stdlib", seq_len=32)
        )
        try:
            found = families.card_of_job(job, style)
            families.require_trainable(job)
        except CannotWork:
            pass  # planned and not trained
        except InputError as error:
            assert all(problem.where.startswith((folder, "data.seq_len")) for problem in error.problems)
            return
    assert found.parameter_elements > 0 and found.forward_flops > 0
    assert len(found.blocks) <= 10_002 and all(saved.elements > 0 for block in found.blocks for saved in block.saved)
