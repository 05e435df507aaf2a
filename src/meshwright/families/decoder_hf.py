"""The decoder that a Hugging Face `config.json` describes: one row for each kind of model that is known.

A row says under which keys the sizes are, and what the kind computes whatever its config says. It is only about shapes
and counts: what decides numbers alone (rotary scaling, norm epsilon, activation) is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.families.decoder import DecoderShape

Config = Mapping[str, Any]
Facts = dict[str, Any]

#: Sizes of a shape -> the keys that kinds of model keep them under, the usual one first.
SIZES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab": ("vocab_size",),
}
LARGEST_SIZE = 1 << 31  # of any number that is read


@dataclass(frozen=True)
class Kind:
    """A `model_type`: facts that hold for all of it, and `more`, what follows from a config."""

    facts: Facts = field(default_factory=dict)
    more: Callable[[Config, Facts], Facts] = lambda config, sizes: {}
    tied: bool = False  # where the config does not say
    ffn: str = "intermediate_size"  # the key of ffn
    ffn_of_hidden: int = 0  # ffn = this x hidden where the config does not say


def shape_from_hf_config(config: Config, where: str = "config.json") -> DecoderShape:
    """The shape of a decoder's config; a config with a `text_config` is taken for its text part.

    Raises InputError for a kind that is not known, a size that is missing or no positive whole number, or a feature
    that a shape does not have.
    """
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else dict(config)
    name = config.get("model_type")
    if name not in KINDS:
        what = f"model_type {name!r} is not a decoder that we know"
        raise InputError(Problem(where, what, f"{nearest_name(str(name), list(KINDS))}; known: {', '.join(KINDS)}"))
    kind, reader = KINDS[name], _Reader(config, where)
    sizes: Facts = {key: reader.size(*keys) for key, keys in SIZES.items()}
    reader.settle()
    sizes["kv_heads"] = reader.size("num_key_value_heads", otherwise=sizes["heads"])
    sizes["head_dim"] = reader.size("head_dim", otherwise=max(1, sizes["hidden"] // sizes["heads"]))
    sizes["ffn"] = reader.size(kind.ffn, otherwise=kind.ffn_of_hidden * sizes["hidden"] or None)
    sizes["tied"] = bool(config.get("tie_word_embeddings", kind.tied))
    reader.settle()
    try:
        facts = {**sizes, **kind.facts, **kind.more(config, sizes), "hf_type": name}
        return DecoderShape(**facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(Problem(where, f"is no config of a {name}: {error!r}", "take the model's own")) from None


class _Reader:
    """Reads sizes of a config and collects what is wrong with them."""

    def __init__(self, config: Config, where: str) -> None:
        self.config, self.where = config, where
        self.problems: list[Problem] = []

    def size(self, *keys: str, otherwise: int | None = None) -> int:
        """The positive whole number under the first of `keys` that is there and not null."""
        key = next((key for key in keys if self.config.get(key) is not None), None)
        value = otherwise if key is None else self.config[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            what = f"{key or keys[0]} must be a positive whole number, found {value!r}"
            self.problems.append(Problem(self.where, what))
            return 1
        return value

    def settle(self) -> None:
        if self.problems:
            raise InputError(self.problems)


def _window(config: Config, sizes: Facts) -> Facts:
    """A sliding window, where every layer has it."""
    types = config.get("layer_types")
    everywhere = not types or set(types) == {"sliding_attention"}
    used = config.get("use_sliding_window", True) and everywhere
    return {"sliding_window": config.get("sliding_window") if used else None}


def _bias(key: str, *places: str, otherwise: bool = False) -> Callable[[Config], tuple[str, ...]]:
    return lambda config: places if config.get(key, otherwise) else ()


def _llama(config: Config, sizes: Facts) -> Facts:
    places = (*_bias("attention_bias", "qkv", "out")(config), *_bias("mlp_bias", "ffn")(config))
    return {"bias_of": places}


def _qwen2_moe(config: Config, sizes: Facts) -> Facts:
    facts = _experts(config, "num_experts", "moe_intermediate_size")
    facts["shared_ffn"] = config.get("shared_expert_intermediate_size") or 0
    return {**facts, **_every(config), "shared_gate": True, "bias_of": ("qkv",) if config.get("qkv_bias", True) else ()}


def _qwen3_moe(config: Config, sizes: Facts) -> Facts:
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    return {**_experts(config, count, "moe_intermediate_size"), **_every(config), **_llama(config, sizes)}


def _experts(config: Config, count: str, width: str) -> Facts:
    experts, top_k = config[count], config["num_experts_per_tok"]
    facts = {"experts": experts, "top_k": top_k, "expert_ffn": config[width]}
    if not all(isinstance(n, int) and 1 <= n <= LARGEST_SIZE for n in facts.values()) or top_k > experts:
        raise ValueError(f"experts {facts}")
    return facts


def _every(config: Config) -> Facts:
    """Qwen's rule: every `decoder_sparse_step`-th layer, less those named. Only a head of dense layers is a shape."""
    dense = sorted(config.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))) or (dense and config.get("decoder_sparse_step", 1) != 1):
        raise ValueError(f"dense layers {dense} between mixtures")
    return {"first_dense_layers": len(dense), "moe_every": config.get("decoder_sparse_step", 1)}


def _deepseek(config: Config, sizes: Facts) -> Facts:
    """Latent attention (head_dim is what has no rotary positions) and, past the first layers, a mixture."""
    facts: Facts = {
        "q_lora": config.get("q_lora_rank") or 0,
        "kv_lora": config["kv_lora_rank"],
        "head_dim": config["qk_nope_head_dim"],
        "rope_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "kv_heads": sizes["heads"],
        "bias_of": ("qkv", "out") if config.get("attention_bias") else (),
    }
    if config.get("n_routed_experts"):
        width = config["moe_intermediate_size"]
        facts |= _experts(config, "n_routed_experts", "moe_intermediate_size")
        facts["shared_ffn"] = (config.get("n_shared_experts") or 0) * width
        facts["first_dense_layers"] = config.get("first_k_dense_replace", 0)
        facts["moe_every"] = config.get("moe_layer_freq", 1)
    return facts


def _mixtral(config: Config, sizes: Facts) -> Facts:
    facts = _experts(config, "num_local_experts", "intermediate_size")
    return {**facts, **_window(config, sizes)}


def _positions(key: str, more: int = 0) -> Callable[[Config, Facts], Facts]:
    return lambda config, sizes: {"learned_positions": config[key] + more}


def _opt(config: Config, sizes: Facts) -> Facts:
    width = config.get("word_embed_proj_dim") or sizes["hidden"]
    facts: Facts = {"learned_positions": config["max_position_embeddings"] + 2, "embed_width": width}
    facts["biases"] = bool(config.get("enable_bias", True))
    facts["norm"] = "layer" if config.get("layer_norm_elementwise_affine", True) else "bare"
    facts["final_norm"] = bool(config.get("do_layer_norm_before", True)) and not config.get("_remove_final_layer_norm")
    return facts


def _falcon(config: Config, sizes: Facts) -> Facts:
    """Falcon 40B and later have groups of heads and two norms, 7B one key and one norm, the first ones neither."""
    newer, parallel = config.get("new_decoder_architecture", False), config.get("parallel_attn", True)
    kv = sizes["heads"]
    if newer:
        kv = config.get("num_kv_heads") or sizes["heads"]
    elif config.get("multi_query", True):
        kv = 1
    norms = config.get("num_ln_in_parallel_attn") or 2 if newer else (1 if parallel else 2)
    return {"kv_heads": kv, "norms": norms, "biases": bool(config.get("bias", False))}


def _gpt_bigcode(config: Config, sizes: Facts) -> Facts:
    return {
        "learned_positions": config["n_positions"],
        "kv_heads": 1 if config.get("multi_query", True) else sizes["heads"],
    }


def _mpt(config: Config, sizes: Facts) -> Facts:
    return {"ffn": int(config.get("expansion_ratio", 4)) * sizes["hidden"]}


def _gpt_neox(config: Config, sizes: Facts) -> Facts:
    return {
        "bias_of": () if config.get("attention_bias", True) else ("ffn",),
        "biases": config.get("attention_bias", True),
    }


def _gemma(config: Config, sizes: Facts) -> Facts:
    return {"head_dim": config.get("head_dim", 256), **_llama(config, sizes)}


def _gemma3(config: Config, sizes: Facts) -> Facts:
    return {**_gemma(config, sizes), "qk_norm": "head"}


def _phi(config: Config, sizes: Facts) -> Facts:
    if config.get("qk_layernorm"):
        raise ValueError("qk_layernorm")
    return {}


def _stablelm(config: Config, sizes: Facts) -> Facts:
    if config.get("qk_layernorm"):
        raise ValueError("qk_layernorm")
    parallel = config.get("use_parallel_residual", False)
    return {"norms": 1 if parallel else 2, "bias_of": ("qkv",) if config.get("use_qkv_bias") else ()}


def _cohere(config: Config, sizes: Facts) -> Facts:
    if config.get("use_qk_norm"):
        raise ValueError("use_qk_norm")
    return _llama(config, sizes)


def _starcoder2(config: Config, sizes: Facts) -> Facts:
    return {"biases": bool(config.get("use_bias", True)), **_window(config, sizes)}


def _olmoe(config: Config, sizes: Facts) -> Facts:
    facts = _experts(config, "num_experts", "intermediate_size")
    return {**facts, **_llama(config, sizes)}


def _gpt_oss(config: Config, sizes: Facts) -> Facts:
    facts = _experts(config, "num_local_experts", "intermediate_size")
    return {**facts, "bias_of": ("qkv", "out", "ffn", "router")}


_GPT = {"gated": False, "biases": True, "norm": "layer"}
#: `model_type` -> how to read it. The order is that of the list in the error.
KINDS: dict[str, Kind] = {
    "llama": Kind(more=_llama),
    "mistral": Kind(more=_window),
    "qwen2": Kind({"bias_of": ("qkv",)}, _window),
    "qwen3": Kind({"qk_norm": "head"}, lambda c, s: {**_window(c, s), **_llama(c, s)}),
    "mixtral": Kind(more=_mixtral),
    "qwen2_moe": Kind(more=_qwen2_moe),
    "qwen3_moe": Kind({"qk_norm": "head"}, _qwen3_moe),
    "deepseek_v2": Kind(more=_deepseek),
    "deepseek_v3": Kind(more=_deepseek),
    "gpt2": Kind(_GPT, _positions("n_positions"), tied=True, ffn="n_inner", ffn_of_hidden=4),
    "gpt_neox": Kind({"gated": False, "norm": "layer"}, _gpt_neox),
    "gpt_neo": Kind(
        {**_GPT, "biases": False, "bias_of": ("out", "ffn")},
        _positions("max_position_embeddings"),
        tied=True,
        ffn_of_hidden=4,
    ),
    "gptj": Kind(
        {"gated": False, "norm": "layer", "norms": 1, "bias_of": ("ffn", "head")}, ffn="n_inner", ffn_of_hidden=4
    ),
    "gpt_bigcode": Kind(_GPT, _gpt_bigcode, tied=True, ffn="n_inner", ffn_of_hidden=4),
    "gpt_oss": Kind({"sinks": True}, _gpt_oss),
    "opt": Kind({"gated": False}, _opt, tied=True, ffn="ffn_dim"),
    "falcon": Kind({"gated": False, "norm": "layer"}, _falcon, tied=True, ffn="ffn_hidden_size", ffn_of_hidden=4),
    "gemma": Kind(more=_gemma, tied=True),
    "gemma2": Kind({"norms": 4}, _gemma, tied=True),
    "gemma3_text": Kind({"norms": 4}, _gemma3, tied=True),
    "gemma3": Kind({"norms": 4}, _gemma3, tied=True),
    "phi": Kind({**_GPT, "norms": 1, "bias_of": ("head",)}, _phi),
    "phi3": Kind(more=_window),
    "mpt": Kind({"gated": False, "norm": "layer_nobias"}, _mpt, tied=True, ffn_of_hidden=4),
    "bloom": Kind({**_GPT, "embedding_norm": True}, tied=True, ffn="n_inner", ffn_of_hidden=4),
    "olmo": Kind({"norm": "bare"}, _llama),
    "olmo2": Kind({"qk_norm": "full"}, _llama),
    "olmoe": Kind({"qk_norm": "full"}, _olmoe),
    "starcoder2": Kind({"gated": False, "norm": "layer"}, _starcoder2, tied=True),
    "stablelm": Kind({"norm": "layer"}, _stablelm),
    "granite": Kind(more=_llama),
    "cohere": Kind({"norm": "layer_nobias", "norms": 1}, _cohere, tied=True),
    "nemotron": Kind({"gated": False, "norm": "layer"}, _llama),
}
