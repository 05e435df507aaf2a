"""Llama, Mistral, Qwen2 and Qwen3 on paper: shape, Hugging Face config and names, Card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from meshwright.card import Activation, Card
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.families import decoder
from meshwright.families.decoder_config import ConfigReader, kind_of, show
from meshwright.families.decoder_shape import DecoderShape

if TYPE_CHECKING:
    from meshwright.job.sections import ModelSection

#: Hugging Face `model_type` -> architecture name that `transformers` looks up.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
#: As in `nn/blocked.py`, which cannot be imported without torch: a test compares them.
QUERIES_AT_ONCE, PROBABILITIES_KEPT = 128, 512
#: Patterns of tensors that a folder may have and a model does not need: rotary frequencies follow from the config, and
#: `transformers` does not read them either.
IGNORED_TENSORS = ("*.rotary_emb.inv_freq",)
#: Kinds of rotary scaling -> the keys of their tables beside `rope_type` or `type`; every other key is refused.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
#: Numbers of that table that `transformers` reads as not given where they are 0.
ROPE_UNSET_AT_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
#: Numbers of a table of rotary scaling, with their usual values.
ROPE_NUMBERS: Mapping[str, float] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class LlamaShape(DecoderShape):
    """A decoder that we train and serve: its sizes and its other numbers.

    All of attention's products have a bias or none; Qwen2 has none on the output (`biases`).
    """

    max_positions: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    norm_eps: float = 1e-5
    hf_type: str = "llama"
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None

    @property
    def longest(self) -> int:
        """Most tokens of a sequence: the positions, or the sliding window if that is shorter.

        Within its window a model with sliding-window attention is an ordinary one; past it ours would differ.
        """
        return min(self.max_positions, self.sliding_window or self.max_positions)


def biases(hf_type: str, attention_bias: bool) -> tuple[str, ...]:
    """`bias_of` of a model of ours, with and without biases."""
    return () if not attention_bias else ("qkv",) if hf_type == "qwen2" else ("qkv", "out")


def shape_from_job(model: ModelSection, seq_len: int) -> LlamaShape:
    """The shape of a job's `[model]` section, with `seq_len` positions."""
    assert model.layers and model.hidden and model.heads and model.ffn and model.vocab, (
        "a Job of a family has its sizes"
    )
    # transformers refuses a Llama whose hidden is not a multiple of its heads, and allows the same model as a Mistral.
    plain = "mistral" if model.hidden % model.heads else "llama"
    hf_type = "qwen3" if model.qk_norm else "qwen2" if model.attention_bias else plain
    return LlamaShape(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim or model.hidden // model.heads,
        ffn=model.ffn,
        vocab=model.vocab,
        max_positions=seq_len,
        rope_theta=model.rope_theta,
        rope_scaling=_rope_scaling(model.rope_scaling, "model.rope_scaling"),
        norm_eps=model.norm_eps,
        tied=model.tied_embeddings,
        qk_norm=model.qk_norm,
        bias_of=biases(hf_type, model.attention_bias),
        hf_type=hf_type,
    )


def shape_from_hf(config: Mapping[str, Any], where: str = "config.json") -> LlamaShape:
    """The shape of a Hugging Face folder's `config.json`.

    Raises InputError for a model type or a feature that this family does not have.
    """
    kind = kind_of(config, where)
    if kind not in ARCHITECTURES:
        known = "known: " + ", ".join(ARCHITECTURES)
        raise InputError(Problem(where, f"model_type {show(kind)} is not one of ours", known))
    reader = ConfigReader(config, where, kind)
    sizes = reader.sizes(usual_keys=True)
    theta, scaling = _rope_of_hf(reader)
    more: dict[str, Any] = {
        "max_positions": reader.size("max_positions", "max_position_embeddings", otherwise=2048),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": reader.number("rms_norm_eps", 1e-6),
        "tied": reader.flag("tie_word_embeddings"),
        "qk_norm": kind == "qwen3",
        "bias_of": biases(kind, _attention_bias(reader, kind)),
        "sliding_window": _sliding_window(reader, kind, sizes["layers"]),
        "hf_type": kind,
        "bos_id": _token_ids(reader, "bos_token_id", several=False),
        "eos_id": _token_ids(reader, "eos_token_id", several=True),
    }
    reader.refuse_unread()
    reader.note_contradictions(sizes)
    reader.raise_problems()
    return LlamaShape(**sizes, **more)


def _attention_bias(reader: ConfigReader, kind: str) -> bool:
    """Whether attention has biases. Mistral's and Qwen2's classes do not read the key: it may only say what they do."""
    fixed = {"mistral": False, "qwen2": True}.get(kind)
    said = reader.flag("attention_bias", otherwise=bool(fixed))
    if fixed is not None and said != fixed:
        reader.refuse(
            f"attention_bias is {json.dumps(said)}, which a {kind} cannot be", f"nearest: {json.dumps(fixed)}"
        )
    return said


def _sliding_window(reader: ConfigReader, kind: str, layers: int) -> int | None:
    """The window of attention, if a layer may have one.

    Qwen's classes use it where `use_sliding_window` says so, in the layers that `layer_types` names or, without that,
    from `max_window_layers` on. Mistral's class uses it in every layer, whatever else is said.
    """
    window = reader.size("sliding_window") if reader.has("sliding_window") else None
    qwen = kind in ("qwen2", "qwen3")
    used = reader.flag("use_sliding_window", otherwise=not qwen) or kind == "mistral"
    first = reader.size("max_window_layers", otherwise=28, least=0)
    types = reader.items("layer_types", str)
    for word in sorted(set(types) - {"full_attention", "sliding_attention"}):
        reader.refuse(f"layer_types has {show(word)}, which is not supported", "supported: full_attention")
    if types and len(types) != layers:
        reader.refuse(f"layer_types has {len(types)} layers of {layers}", "leave it out")
    if window is None or not used:
        if "sliding_attention" in types:
            reader.refuse(
                "layer_types has 'sliding_attention', but no sliding_window is used", "nearest: full_attention"
            )
        return None
    slides = "sliding_attention" in types if types else first < layers
    return window if slides or not qwen else None


def _token_ids(reader: ConfigReader, key: str, *, several: bool) -> Any:
    """The token id under `key`, or a tuple of `several`; None if there is none."""
    value = reader.config.get(key)
    if value is None or type(value) is int:
        return value
    if several and isinstance(value, list):
        return tuple(reader.items(key, int))
    what = "a token id or a list of them" if several else "a token id"
    reader.refuse(f"{key} must be {what}, found {show(value)}", "leave it out")
    return None


def _rope_of_hf(reader: ConfigReader) -> tuple[float, Mapping[str, Any] | None]:
    """Base and scaling of the rotary positions, which a config may have in one table."""
    theta, rope, where = reader.rope()
    _refuse_partial(reader)
    key = "original_max_position_embeddings"  # beside the table it is not read by these models' classes
    kept = rope.get(key) or reader.config.get("max_position_embeddings")
    if reader.has(key) and rope.get("factor") and reader.config[key] != kept:
        reader.refuse(f"{key} is {show(reader.config[key])} beside {show(kept)} of the rope table", "write it there")
    try:
        return theta, _rope_scaling(rope, where)
    except InputError as error:
        reader.problems += error.problems
        return theta, None


def _refuse_partial(reader: ConfigReader) -> None:
    part = reader.config.get("partial_rotary_factor")
    if part not in (None, 1):
        reader.refuse(f"partial_rotary_factor {show(part)} is not supported", "supported: 1")


def _rope_scaling(rope: Mapping[str, Any] | None, where: str) -> Mapping[str, Any] | None:
    """The scaling table with its kind under `rope_type`; None for plain rotary positions."""
    if not rope:
        return None
    unset = {key for key in ROPE_UNSET_AT_ZERO if type(rope.get(key)) in (int, float) and rope[key] == 0}
    scaling = {key: value for key, value in rope.items() if key != "type" and key not in unset}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        known = list(ROPE_TYPES)
        hint = nearest_name(str(kind)[:60], known) if isinstance(kind, str) else "known: " + ", ".join(known)
        raise InputError(Problem(where, f"rope_type {show(kind)} is not supported", hint))
    reader = ConfigReader(scaling, where)
    _refuse_partial(reader)
    for key in sorted(scaling.keys() - {"rope_type", "partial_rotary_factor", *ROPE_TYPES[kind]}):
        if scaling[key] is not None:
            reader.refuse(f"{key[:60]!r} is not a key of rope_type {kind!r}", "leave it out")
    reader.raise_problems()
    if kind == "default":
        return None
    if scaling.get("factor") is None:
        raise InputError(Problem(where, f"rope_type {kind!r} needs a factor", "such as factor = 8.0"))
    needed = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    numbers = {key: reader.number(key, usual, needed=key in needed) for key, usual in ROPE_NUMBERS.items()}
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if needed and not reader.problems and low >= high:
        reader.refuse(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}", f"such as {high / 4:g}")
    reader.flag("truncate", otherwise=True)
    reader.raise_problems()
    used = {key: value for key, value in scaling.items() if key in ROPE_TYPES[kind]}
    return {**used, "rope_type": kind}


def hf_config(shape: LlamaShape) -> dict[str, Any]:
    """The `config.json` of the same model in `transformers`."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.hf_type]],
        "model_type": shape.hf_type,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default", **(shape.rope_scaling or {})},
        "rope_scaling": dict(shape.rope_scaling) if shape.rope_scaling else None,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": shape.bos_id,
        "eos_token_id": list(shape.eos_id) if isinstance(shape.eos_id, tuple) else shape.eos_id,
    }
    if shape.hf_type in ("llama", "qwen3"):
        config["attention_bias"] = shape.bias("qkv")
    if shape.hf_type == "llama":
        config["mlp_bias"] = False
    if shape.hf_type == "mistral":
        config["sliding_window"] = shape.sliding_window
    if shape.hf_type in ("qwen2", "qwen3"):
        config["use_sliding_window"] = shape.sliding_window is not None
        config["sliding_window"] = shape.sliding_window
    return config


def hf_names(shape: LlamaShape) -> dict[str, str]:
    """Our parameter name -> the tensor's name in a Hugging Face folder. A tied output head has no entry."""
    inside = {
        "attn_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attn.q_norm.weight": "self_attn.q_norm.weight",
        "attn.k_norm.weight": "self_attn.k_norm.weight",
        **{f"attn.{p}.{kind}": f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")},
        **{f"ffn.{p}.weight": f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    }
    names = {}
    for parameter in decoder.parameters(shape):
        _, block, rest = parameter.name.split(".", 2)
        if block == "embed":
            names[parameter.name] = "model.embed_tokens.weight"
        elif block == "head":
            names[parameter.name] = "model.norm.weight" if rest == "norm.weight" else "lm_head.weight"
        else:
            names[parameter.name] = f"model.layers.{block}.{inside[rest]}"
    return names


def tied_tensors(shape: LlamaShape) -> dict[str, str]:
    """The name in a Hugging Face folder of an alias, and that of the weight to which it is tied."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if shape.tied else {}


def _norm_activations(name: str, t: int, h: int) -> tuple[Activation, ...]:
    """A norm keeps its input and each token's scale; on a CPU, where it is several operations, fp32 copies of its input
    and of its result before the weight."""
    return (
        Activation(f"{name} input", t * h, "sp", selective=True, on="cuda"),
        Activation(f"{name} input", t * h, "sp", bytes_per_element=4, selective=True, on="cpu"),
        Activation(f"{name} without its weight", t * h, "sp", bytes_per_element=4, selective=True, on="cpu"),
        Activation(f"{name} scale", t, "sp", bytes_per_element=4, selective=True),
    )


def _layer_activations(shape: LlamaShape, t: int) -> tuple[Activation, ...]:
    """The activations of a layer, by the operations of `module.py`; for selective recompute, as in `parallel.apply`.

    Keys and values are repeated for the query heads that share them, except in the blocked attention of bf16 on a CPU,
    which keeps its probabilities for short sequences (`nn/blocked.py`).
    """
    h, ffn, heads = shape.hidden, shape.ffn, shape.heads
    q, kv = heads * shape.head_dim, shape.kv_heads * shape.head_dim
    repeated = q if heads > shape.kv_heads else kv
    table = [
        *_norm_activations("attn_norm", t, h),
        Activation("qkv input", t * h, selective=True),
        Activation("cosines and sines", 2 * t * shape.head_dim, selective=True),
        Activation("q", t * q, "tp", selective=True),
        Activation("attention output", t * q, "tp"),
    ]
    for place in ("cuda", "cpu fp32"):
        table.append(Activation("k and v", 2 * t * repeated, "tp", selective=True, on=place))
        table.append(Activation("attention log-sum-exp", t * heads, "tp", bytes_per_element=4, on=place))
    table += [
        Activation("k and v", 2 * t * kv, "tp", selective=True, on="cpu bf16"),
        Activation("attention probabilities", heads * saved_probabilities(t), "tp", selective=True, on="cpu bf16"),
        *_norm_activations("ffn_norm", t, h),
        Activation("gate and up input", t * h, selective=True),
        Activation("gate and up", 2 * t * ffn, "tp"),
        Activation("silu and product", 2 * t * ffn, "tp", selective=True),
        Activation("layer input", t * h, "sp", on="selective"),
        Activation("q, k and v before rotation", t * (q + 2 * kv), "tp", on="selective"),
        Activation("products into the residual stream", 2 * t * h, on="selective"),
        Activation("their sums over tensor-parallel ranks", 2 * t * h, "sp", on="selective tp"),
    ]
    return tuple(table)


def saved_probabilities(t: int) -> int:
    """Probabilities of one head that the blocked attention of `t` tokens keeps: those of each block of queries with all
    keys up to its end, none beyond PROBABILITIES_KEPT tokens."""
    if t > PROBABILITIES_KEPT:
        return 0
    ends = [min(start + QUERIES_AT_ONCE, t) for start in range(0, t, QUERIES_AT_ONCE)]
    return sum((end - start) * end for start, end in zip((0, *ends), ends, strict=False))


def card(shape: LlamaShape, seq_len: int) -> Card:
    """The Card for sequences of `seq_len` tokens, at most `shape.longest`: a decoder's, with the saved activations of
    `module.py`, operation by operation."""
    t = seq_len
    head = (
        *_norm_activations("norm", t, shape.hidden),
        Activation("out input", t * shape.hidden, selective=True),
        Activation("logits and their gradient", 2 * t * shape.vocab, "tp", module="loss"),
    )
    saved = {"embedding": (), "layer": _layer_activations(shape, t), "head": head}
    base = decoder.card(replace(shape, sliding_window=None), t)
    return replace(base, blocks=tuple(replace(block, saved=saved[block.kind]) for block in base.blocks))
