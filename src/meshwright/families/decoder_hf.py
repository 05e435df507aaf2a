"""The decoder that a Hugging Face `config.json` describes: one row per known kind of model.

A row has the keys of the sizes and the facts that hold for every model of the kind. `numbers_of` reads values that are
not part of a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.families.decoder_config import (
    DTYPES,
    EPSILONS,
    LARGEST_SIZE,
    NUMBERS,
    ConfigReader,
    ShapeFields,
    kind_of,
    precision_of,
    show,
)
from meshwright.families.decoder_shape import DecoderShape

Config = Mapping[str, Any]

#: Most tokens of a sequence if a config does not say.
USUAL_POSITIONS = 4096


@dataclass(frozen=True)
class ModelType:
    """A `model_type`: `facts` of all its models, and `more`, which reads others from a config."""

    facts: ShapeFields = field(default_factory=dict)
    more: Callable[[ConfigReader, ShapeFields], ShapeFields] = lambda config, sizes: {}
    tied: bool = False  # if the config does not say
    ffn: str = "intermediate_size"  # the key of ffn
    ffn_of_hidden: int = 0  # ffn = this x hidden if the config does not say
    head_dim: int = 0  # if the config does not say; 0: hidden / heads
    rotary: bool = True  # positions rotate whole heads


def shape_from_hf_config(config: Config, where: str = "config.json") -> DecoderShape:
    """The shape of a decoder's config; of a config with a `text_config`, its text part's.

    Raises InputError for an unknown kind, a missing or wrong value, contradicting sizes, or a feature that a shape does
    not have.
    """
    config = _text_part(config)
    name = kind_of(config, where)
    if name not in KINDS:
        what = f"model_type {show(name)} is not a decoder that we know"
        close = nearest_name(str(name)[:60], list(KINDS))
        raise InputError(Problem(where, what, f"{close}; known: {', '.join(KINDS)}"))
    kind, reader = KINDS[name], ConfigReader(config, where, name)
    sizes = reader.sizes(ffn=kind.ffn, ffn_of_hidden=kind.ffn_of_hidden, head_dim=kind.head_dim, rotary=kind.rotary)
    sizes["tied"] = reader.flag("tie_word_embeddings", otherwise=kind.tied)
    facts = {**sizes, **kind.facts, **kind.more(reader, sizes), "hf_type": name}
    reader.check_numbers()
    shared_width = not kind.head_dim and not facts.get("kv_lora")
    reader.note_contradictions(facts, shared_width=shared_width, rotary=kind.rotary)
    reader.raise_problems()
    return DecoderShape(**facts)


def numbers_of(config: Config, where: str) -> tuple[str, int, float, Config | None, float]:
    """Values of a config that are not part of a shape, or usual ones: precision of the saved weights, most tokens of a
    sequence, base and scaling of the rotary positions, epsilon of the norms. Raises InputError for a wrong one."""
    text = _text_part(config)
    reader = ConfigReader(text, where, kind_of(text, where) or "")
    eps = reader.number(next(filter(reader.has, EPSILONS), EPSILONS[0]), NUMBERS[EPSILONS[0]])
    theta, rope, _ = reader.rope()
    longest = reader.size("positions", "max_position_embeddings", "n_positions", otherwise=USUAL_POSITIONS)
    quantized = reader.table("quantization_config")
    reader.raise_problems()
    scaled = rope and rope.get("rope_type", rope.get("type")) != "default"
    precision = "fp8" if quantized.get("quant_method") == "fp8" else precision_of(text)
    return precision, longest, theta, rope if scaled else None, eps


def _text_part(config: Config) -> dict[str, Any]:
    """What a config says about its text part: the part's own keys first, then those beside it."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return dict(config)
    said = {key: value for key, value in text.items() if value is not None}
    beside = {key: value for key, value in config.items() if not (key in DTYPES and any(map(said.get, DTYPES)))}
    return {**text, **beside, **said}


def _window(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    """A sliding window, if every layer has it."""
    everywhere = set(config.items("layer_types", str)) <= {"sliding_attention"}
    used = config.flag("use_sliding_window", otherwise=True) and everywhere and config.has("sliding_window")
    return {"sliding_window": config.size("sliding_window") if used else None}


def _llama(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    attention, ffn = config.flag("attention_bias"), config.flag("mlp_bias")
    return {"bias_of": (*(("qkv", "out") if attention else ()), *(("ffn",) if ffn else ()))}


def _qwen2_moe(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    facts = _experts(config, "num_experts", "moe_intermediate_size")
    facts["shared_ffn"] = config.size("shared_ffn", "shared_expert_intermediate_size", otherwise=0, least=0)
    biases = ("qkv",) if config.flag("qkv_bias", otherwise=True) else ()
    return {**facts, **_every(config), "shared_gate": True, "bias_of": biases}


def _qwen3_moe(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    count = "num_experts" if config.has("num_experts") else "num_local_experts"
    return {**_experts(config, count, "moe_intermediate_size"), **_every(config), **_llama(config, sizes)}


def _experts(config: ConfigReader, count: str, width: str) -> ShapeFields:
    return {
        "experts": config.size("experts", count),
        "top_k": config.size("top_k", "num_experts_per_tok"),
        "expert_ffn": config.size("expert_ffn", width),
    }


def _every(config: ConfigReader) -> ShapeFields:
    """Qwen's rule: every `decoder_sparse_step`-th layer but the named ones. In a shape dense layers must come first."""
    dense = sorted(config.items("mlp_only_layers", int, field="first_dense_layers"))
    step = config.size("moe_every", "decoder_sparse_step", otherwise=1)
    if dense != list(range(len(dense))):
        what = f"mlp_only_layers {show(dense)} is not supported: dense layers come first, in one row from 0 on"
        config.refuse(what, f"nearest: {show(list(range(len(set(dense)))))}")
    elif dense and step != 1:
        what = f"decoder_sparse_step {step} is not supported beside mlp_only_layers"
        config.refuse(what, "nearest: decoder_sparse_step=1")
    return {"first_dense_layers": len(dense), "moe_every": step}


def _deepseek(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    """Latent attention (head_dim is the part without rotary positions) and, after the first layers, a mixture."""
    # Before kv_heads becomes that of latent attention.
    config.note_contradictions(sizes, shared_width=False, rotary=False)
    facts: ShapeFields = {
        "q_lora": config.size("q_lora", "q_lora_rank", otherwise=0, least=0),
        "kv_lora": config.size("kv_lora", "kv_lora_rank"),
        "head_dim": config.size("head_dim", "qk_nope_head_dim"),
        "rope_head_dim": config.size("rope_head_dim", "qk_rope_head_dim", least=2),
        "v_head_dim": config.size("v_head_dim"),
        "kv_heads": sizes["heads"],
        "bias_of": ("qkv", "out") if config.flag("attention_bias") else (),
    }
    if config.size("experts", "n_routed_experts", otherwise=0, least=0):
        facts |= _experts(config, "n_routed_experts", "moe_intermediate_size")
        width = facts["expert_ffn"]
        shared = config.size("shared", "n_shared_experts", otherwise=0, least=0, most=LARGEST_SIZE // width)
        facts["shared_ffn"] = shared * width
        facts["first_dense_layers"] = config.size("first_dense_layers", "first_k_dense_replace", otherwise=0, least=0)
        facts["moe_every"] = config.size("moe_every", "moe_layer_freq", otherwise=1)
    return facts


def _mixtral(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    return {**_experts(config, "num_local_experts", "intermediate_size"), **_window(config, sizes)}


def _positions(key: str) -> Callable[[ConfigReader, ShapeFields], ShapeFields]:
    return lambda config, sizes: {"learned_positions": config.size("learned_positions", key)}


def _opt(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    norm = "layer" if config.flag("layer_norm_elementwise_affine", otherwise=True) else "bare"
    final_norm = config.flag("do_layer_norm_before", otherwise=True) and not config.flag("_remove_final_layer_norm")
    return {
        "learned_positions": config.size("learned_positions", "max_position_embeddings") + 2,
        "embed_width": config.size("embed_width", "word_embed_proj_dim", otherwise=sizes["hidden"]),
        "biases": config.flag("enable_bias", otherwise=True),
        "norm": norm,
        "final_norm": final_norm,
    }


def _falcon(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    """Falcon 40B and later: groups of heads and two norms. 7B: one key and one norm. The first models: neither."""
    biases = config.flag("bias")
    if config.flag("new_decoder_architecture"):
        kv_heads = config.size("kv_heads", "num_kv_heads", otherwise=sizes["heads"])
        norms = config.size("norms", "num_ln_in_parallel_attn", otherwise=2, most=2)
        return {"kv_heads": kv_heads, "norms": norms, "biases": biases}
    kv_heads = 1 if config.flag("multi_query", otherwise=True) else sizes["heads"]
    norms = 1 if config.flag("parallel_attn", otherwise=True) else 2
    return {"kv_heads": kv_heads, "norms": norms, "biases": biases}


def _gpt_bigcode(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    return {
        "learned_positions": config.size("learned_positions", "n_positions"),
        "kv_heads": 1 if config.flag("multi_query", otherwise=True) else sizes["heads"],
    }


def _mpt(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    ratio = config.number("expansion_ratio", 4.0, least=1.0, most=max(1, LARGEST_SIZE // sizes["hidden"]))
    return {"ffn": int(ratio) * sizes["hidden"]}


def _gpt_neox(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    biases = config.flag("attention_bias", otherwise=True)
    return {"bias_of": () if biases else ("ffn",), "biases": biases}


def _refuse(config: ConfigReader, flag: str) -> None:
    if config.flag(flag):
        config.refuse(f"{flag} is not supported", f"supported: {flag} false")


def _phi(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    _refuse(config, "qk_layernorm")
    return {}


def _stablelm(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    _refuse(config, "qk_layernorm")
    parallel = config.flag("use_parallel_residual")
    return {"norms": 1 if parallel else 2, "bias_of": ("qkv",) if config.flag("use_qkv_bias") else ()}


def _cohere(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    _refuse(config, "use_qk_norm")
    return _llama(config, sizes)


def _starcoder2(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    return {"biases": config.flag("use_bias", otherwise=True), **_window(config, sizes)}


def _olmoe(config: ConfigReader, sizes: ShapeFields) -> ShapeFields:
    return {**_experts(config, "num_experts", "intermediate_size"), **_llama(config, sizes)}


_GPT = {"gated": False, "biases": True, "norm": "layer"}
#: `model_type` -> how to read it, in the order of the error's list.
KINDS: dict[str, ModelType] = {
    "llama": ModelType(more=_llama),
    "mistral": ModelType(more=_window),
    "qwen2": ModelType({"bias_of": ("qkv",)}, _window),
    "qwen3": ModelType({"qk_norm": "head"}, lambda c, s: {**_window(c, s), **_llama(c, s)}),
    "mixtral": ModelType(more=_mixtral),
    "qwen2_moe": ModelType(more=_qwen2_moe),
    "qwen3_moe": ModelType({"qk_norm": "head"}, _qwen3_moe),
    "deepseek_v2": ModelType(more=_deepseek),
    "deepseek_v3": ModelType(more=_deepseek),
    "gpt2": ModelType(_GPT, _positions("n_positions"), tied=True, ffn="n_inner", ffn_of_hidden=4, rotary=False),
    "gpt_neox": ModelType({"gated": False, "norm": "layer"}, _gpt_neox, rotary=False),
    "gpt_neo": ModelType(
        {**_GPT, "biases": False, "bias_of": ("out", "ffn")},
        _positions("max_position_embeddings"),
        tied=True,
        ffn_of_hidden=4,
        rotary=False,
    ),
    "gptj": ModelType(
        {"gated": False, "norm": "layer", "norms": 1, "bias_of": ("ffn", "head")},
        ffn="n_inner",
        ffn_of_hidden=4,
        rotary=False,
    ),
    "gpt_bigcode": ModelType(_GPT, _gpt_bigcode, tied=True, ffn="n_inner", ffn_of_hidden=4, rotary=False),
    "gpt_oss": ModelType(
        {"sinks": True, "bias_of": ("qkv", "out", "ffn", "router")},
        lambda c, s: _experts(c, "num_local_experts", "intermediate_size"),
    ),
    "opt": ModelType({"gated": False}, _opt, tied=True, ffn="ffn_dim", rotary=False),
    "falcon": ModelType(
        {"gated": False, "norm": "layer"}, _falcon, tied=True, ffn="ffn_hidden_size", ffn_of_hidden=4, rotary=False
    ),
    "gemma": ModelType(more=_llama, tied=True, head_dim=256),
    "gemma2": ModelType({"norms": 4}, _llama, tied=True, head_dim=256),
    "gemma3_text": ModelType({"norms": 4, "qk_norm": "head"}, _llama, tied=True, head_dim=256),
    "gemma3": ModelType({"norms": 4, "qk_norm": "head"}, _llama, tied=True, head_dim=256),
    "phi": ModelType({**_GPT, "norms": 1, "bias_of": ("head",)}, _phi, rotary=False),
    "phi3": ModelType(more=_window),
    "mpt": ModelType({"gated": False, "norm": "layer_nobias"}, _mpt, tied=True, ffn_of_hidden=4, rotary=False),
    "bloom": ModelType({**_GPT, "embedding_norm": True}, tied=True, ffn="n_inner", ffn_of_hidden=4, rotary=False),
    "olmo": ModelType({"norm": "bare"}, _llama),
    "olmo2": ModelType({"qk_norm": "full"}, _llama),
    "olmoe": ModelType({"qk_norm": "full"}, _olmoe),
    "starcoder2": ModelType({"gated": False, "norm": "layer"}, _starcoder2, tied=True),
    "stablelm": ModelType({"norm": "layer"}, _stablelm, rotary=False),
    "granite": ModelType(more=_llama),
    "cohere": ModelType({"norm": "layer_nobias", "norms": 1}, _cohere, tied=True),
    "nemotron": ModelType({"gated": False, "norm": "layer"}, _llama, rotary=False),
}
