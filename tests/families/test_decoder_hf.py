"""Shapes read from Hugging Face configs, against the models that `transformers` builds from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.families.decoder import parameters
from meshwright.families.decoder_hf import KINDS, shape_from_hf_config

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


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=3), st.lists(st.none())
)


@given(kind=st.sampled_from(sorted(KINDS)), changes=st.dictionaries(st.sampled_from([*BASE, *LATENT, *MOE]), VALUES))
def test_any_config_gives_a_shape_or_an_input_error(kind: str, changes: dict[str, Any]) -> None:
    try:
        shape = shape_from_hf_config({**BASE, **LATENT, **MOE, **LOCAL, **GPT, **OPT, **changes, "model_type": kind})
    except InputError:
        return
    assert shape.layers >= 1 and shape.kv_heads >= 1
