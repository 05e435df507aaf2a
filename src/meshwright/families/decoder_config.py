"""Values of a Hugging Face `config.json`: each is checked by itself, then against the others.

Problems are collected, each with its key and the nearest value that works, so that one error lists all of them. A size
that is not a number, or too large for any machine, is refused here, before a plan uses it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.divisors import divisors, nearest_divisor
from meshwright.errors import InputError, Problem
from meshwright.families.config_keys import NEUTRAL, WITHOUT_EFFECT

ShapeFields = dict[str, Any]

#: The limits of a job's keys: the largest size and number, and the most layers.
LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 1e12
MOST_LAYERS = 10_000

#: Sizes of a shape -> their keys in different kinds of model, the usual one first.
SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab": ("vocab_size",),
}
#: Numbers that are not sizes, with their usual values; some are written into the configurations of other frameworks.
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
NUMBERS: Mapping[str, float] = {
    **dict.fromkeys(EPSILONS, 1e-5),
    "rope_theta": 10000.0,
}

_QWEN = {
    **{"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096},
    **{"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}
_GEMMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 8192}
#: `model_type` -> what a key means that the config does not have, where its class in `transformers` has another default
#: than is usual. A test compares them. Keys that must be there have none.
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        **{"num_key_value_heads": 8, "sliding_window": 4096},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "mixtral": {"num_key_value_heads": 8, "rope_theta": 1e6, "max_position_embeddings": 131072},
    "qwen2_moe": {**_QWEN, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {**_QWEN, "num_key_value_heads": 4},
    "deepseek_v2": {
        **{"q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    },
    "deepseek_v3": {
        **{"q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3},
        **{"rms_norm_eps": 1e-6},
    },
    "gpt_neox": {"max_position_embeddings": 2048},
    "gptj": {"n_positions": 2048},
    "gpt_oss": {
        **{"num_key_value_heads": 8, "head_dim": 64, "rope_theta": 150000.0},
        **{"max_position_embeddings": 131072},
    },
    "falcon": {"max_position_embeddings": 2048},
    "gemma": {**_GEMMA, "num_key_value_heads": 16},
    "gemma2": {**_GEMMA, "num_key_value_heads": 4},
    "gemma3_text": {**_GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 131072},
    "gemma3": {**_GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 131072},
    "phi": {"max_position_embeddings": 2048},
    "olmo": {"max_position_embeddings": 2048},
    "olmo2": {"max_position_embeddings": 2048},
    "starcoder2": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 32},
    "granite": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "cohere": {"rope_theta": 500000.0, "max_position_embeddings": 8192},
}
#: Keys of the weights' element type, the newer one first.
DTYPES = ("dtype", "torch_dtype")
#: Torch's names of element types -> ours.
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def kind_of(config: Mapping[str, Any], where: str) -> str | None:
    """The `model_type`, None if there is none. Raises InputError if it is not text."""
    kind = config.get("model_type")
    if kind is None or isinstance(kind, str):
        return kind
    raise InputError(Problem(where, f"model_type must be text, found {show(kind)}", 'such as "llama"'))


def precision_of(config: Mapping[str, Any]) -> str:
    """Our word for the element type of a config's weights, fp32 for an unknown one or none."""
    return PRECISIONS.get(str(next(filter(None, map(config.get, DTYPES)), None)), "fp32")


def show(value: Any) -> str:
    """A value for a message, cut to a readable length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints, or lists in lists in lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


class _Noted(dict[str, Any]):
    """A config that notes the keys that were asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, otherwise: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, otherwise)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


class ConfigReader:
    """Reads a config key by key, with the defaults of its `kind` for keys that it does not have.

    A null counts as an absent key without such a default, except for flags, where it is false. A wrong value is noted
    in `problems`, which `raise_problems` raises, and replaced by a valid one.
    """

    def __init__(self, config: Mapping[str, Any], where: str, kind: str = "") -> None:
        self.defaults = CLASS_DEFAULTS.get(kind, {})
        self.config, self.where = _Noted({**self.defaults, **config}), where
        self._given = config
        self.problems: list[Problem] = []
        self._keys: dict[str, str] = {}

    def raise_problems(self) -> None:
        """Raises InputError with all noted problems."""
        if self.problems:
            raise InputError(self.problems)

    def refuse(self, what: str, nearest: str = "") -> None:
        """Notes a problem, once."""
        if all(problem.what != what for problem in self.problems):
            self.problems.append(Problem(self.where, what, nearest))

    def refuse_unread(self) -> None:
        """Notes a problem for each key that was not read, unless it is known to change nothing (config_keys.py)."""
        unread = {key: value for key, value in self._given.items() if key not in self.config.asked}
        passed = {key for keys in WITHOUT_EFFECT.values() for key in keys}
        known = [*self.config.asked, *passed, *NEUTRAL]
        for key, value in unread.items():
            if value is None or key in passed or value in NEUTRAL.get(key, ()):
                continue
            if key in NEUTRAL:
                usual = ", ".join(json.dumps(one) for one in NEUTRAL[key])
                self.refuse(f"{key} {show(value)} is not supported", f"supported: {usual or 'null'}")
                continue
            close = difflib.get_close_matches(key[:60], known, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out if the model does not depend on it"
            self.refuse(f"{key[:60]!r} is not a key that we know, so what it says would be passed over", hint)

    def has(self, key: str) -> bool:
        return self.config.get(key) is not None

    def size(
        self, field: str, *keys: str, otherwise: int | None = None, least: int = 1, most: int = LARGEST_SIZE
    ) -> int:
        """The whole number from `least` to `most` under the first of `keys` in the config, which is required without
        `otherwise`. `field` is the shape's word for it, and its key if there are no `keys`."""
        names = keys or (field,)
        key = next((name for name in names if self.has(name)), None)
        self._keys[field] = key or names[0]
        value: Any = otherwise if key is None else self.config[key]
        otherwise = self.defaults.get(names[0], otherwise)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and value <= most and (key is None or value >= least):
            return value
        sort = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        found = ", and is not there" if value is None else f", found {show(value)}"
        what = f"{self._keys[field]} must be {f'at most {most}' if whole and value > most else sort}{found}"
        hints = [_nearest_size(value, least, most)]
        if key is not None and otherwise is not None and f"nearest: {otherwise}" not in hints:
            hints.append(f"leave it out for {otherwise}")
        self.refuse(what, ", or ".join(filter(None, hints)) or "take the model's own")
        return least

    def number(
        self, key: str, usual: float, *, needed: bool = False, least: float = 0.0, most: float = LARGEST_NUMBER
    ) -> float:
        """The number above 0, from `least` to `most`, under `key`; if absent, the `usual` one, unless `needed`."""
        value = self.config.get(key)
        if value is None and not needed:
            return usual
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and least <= value <= most:
            return float(value)
        span = f"from {least:g} to {most:g}" if least else f"above 0, at most {most:g}"
        found = f", found {show(value)}" if value is not None else ", and is not there"
        self.refuse(f"{key} must be a number {span}{found}", f"such as {usual:g}")
        return usual

    def rope(self) -> tuple[float, dict[str, Any], str]:
        """Base of the rotary positions, the rest of their table, and where that is: in one table or beside it."""
        key = "rope_parameters" if self.config.get("rope_parameters") else "rope_scaling"
        tables = [self.table(name) for name in ("rope_scaling", "rope_parameters")]
        rope = {**tables[0], **tables[1]}
        for name in sorted(tables[0].keys() & tables[1].keys()):
            if tables[0][name] != tables[1][name]:
                both = f"{show(tables[0][name])} in rope_scaling and {show(tables[1][name])} in rope_parameters"
                self.refuse(f"{name[:60]} is {both}", "give one of these tables")
        theta = self.number("rope_theta", 10000.0)
        if self._given.get("rope_theta") is not None and (rope.get("rope_theta") or theta) != theta:
            self.refuse(f"rope_theta is {show(theta)}, but {show(rope['rope_theta'])} in {key}", "give one of them")
        inner = ConfigReader({"rope_theta": rope.pop("rope_theta", None)}, f"{self.where}: {key}")
        theta = inner.number("rope_theta", theta)
        self.problems += inner.problems
        return theta, rope, inner.where

    def flag(self, key: str, otherwise: bool = False) -> bool:
        """True or false under `key`; `otherwise` if it is absent."""
        value = self.config.get(key, otherwise)
        if value is None or isinstance(value, bool):
            return bool(value)
        word = str(value).lower() if isinstance(value, str) and value.lower() in ("true", "false") else ""
        hint = f"nearest: {word}, without quotes" if word else f"leave it out for {str(otherwise).lower()}"
        self.refuse(f"{key} must be true or false, found {show(value)}", hint)
        return otherwise

    def table(self, key: str) -> Mapping[str, Any]:
        """The object under `key`, {} if it is absent."""
        value = self.config.get(key)
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.refuse(f"{key} must be an object, found {show(value)}", "leave it out")
        return {}

    def items(self, key: str, of: type, field: str = "") -> list[Any]:
        """The list under `key` with items of type `of`, [] if it is absent. `field` as in size."""
        self._keys[field or key] = key
        value = self.config.get(key)
        if value is None:
            return []
        if isinstance(value, list) and all(type(item) is of for item in value):
            return value
        words = {str: "texts", int: "whole numbers"}[of]
        self.refuse(f"{key} must be a list of {words}, found {show(value)}", "leave it out")
        return []

    def sizes(
        self,
        *,
        usual_keys: bool = False,
        ffn: str = "intermediate_size",
        ffn_of_hidden: int = 0,
        head_dim: int = 0,
        rotary: bool = True,
    ) -> ShapeFields:
        """The sizes of every decoder, under SIZE_KEYS or only the usual ones.

        The feed-forward width is under the key `ffn`, by default `ffn_of_hidden` times the model's. A head's is by
        default `head_dim`, and if that is 0 its share of the model's. `rotary`: positions rotate whole heads, in pairs.
        """
        facts: ShapeFields = {}
        for field, keys in SIZE_KEYS.items():
            most = MOST_LAYERS if field == "layers" else LARGEST_SIZE
            facts[field] = self.size(field, *(keys[:1] if usual_keys else keys), most=most)
        heads, hidden = facts["heads"], facts["hidden"]
        facts["kv_heads"] = self.size("kv_heads", "num_key_value_heads", otherwise=heads)
        each = head_dim or max(1, hidden // heads)
        facts["head_dim"] = self.size("head_dim", otherwise=each, least=2 if rotary else 1)
        facts["ffn"] = self.size("ffn", ffn, otherwise=ffn_of_hidden * hidden or None)
        return facts

    def check_numbers(self) -> None:
        """Checks values that are not part of a shape: epsilons, rotary positions, the longest sequence."""
        for key, usual in NUMBERS.items():
            self.number(key, usual)
        for key in ("rope_scaling", "rope_parameters"):
            self.table(key)
        if self.has("max_position_embeddings"):
            self.size("positions", "max_position_embeddings")

    def note_contradictions(self, facts: ShapeFields, *, shared_width: bool = True, rotary: bool = True) -> None:
        """Notes contradictions between the sizes in `facts`, by the words of DecoderShape.

        `shared_width`: without a head_dim, each head has its share of the model's width. `rotary`: positions rotate
        whole heads.
        """
        if self.problems:
            return  # some of these are not sizes
        for what, nearest in self._contradictions(facts, shared_width and not self.has("head_dim"), rotary):
            self.refuse(what, nearest)

    def _contradictions(self, facts: ShapeFields, divided: bool, rotary: bool) -> Iterator[tuple[str, str]]:
        key = self._keys
        heads, kv_heads, hidden = facts["heads"], facts["kv_heads"], facts["hidden"]
        if heads % kv_heads:
            hint = f"nearest: {key['kv_heads']}={nearest_divisor(heads, kv_heads)}"
            if near := _nearest_heads(heads, kv_heads, hidden if divided else 0):
                hint += f", or {key['heads']}={near}"
            yield f"{key['kv_heads']} {kv_heads} does not divide {key['heads']} {heads}", hint
        if divided and hidden % heads:
            near = _nearest_heads(heads, kv_heads, hidden) or nearest_divisor(hidden, heads)
            what = f"{key['heads']} {heads} does not divide {key['hidden']} {hidden}"
            yield what, f"nearest: {key['heads']}={near}, or give head_dim"
        elif rotary:
            for field in ("head_dim", "rope_head_dim"):
                size = facts.get(field, 0)
                if size % 2 and not (field == "head_dim" and facts.get("kv_lora")):
                    derived = f", {key['hidden']} / {key['heads']}," if field == "head_dim" and divided else ""
                    what = f"{key[field]}{derived} must be even for rotary positions, not {size}"
                    yield what, f"nearest: {key[field]}={size + 1 if size < LARGEST_SIZE else size - 1}"
        if facts.get("top_k", 0) > facts.get("experts", 0):
            what = f"{key['top_k']} {facts['top_k']} is more than {key['experts']} {facts['experts']}"
            yield what, f"nearest: {key['top_k']}={facts['experts']}"
        if facts.get("first_dense_layers", 0) > facts["layers"]:
            what = f"{key['first_dense_layers']}: {facts['first_dense_layers']} dense layers are more than "
            yield f"{what}{key['layers']} {facts['layers']}", f"nearest: {facts['layers']}"


def _nearest_size(value: Any, least: int, most: int) -> str:
    """A hint of the size closest to `value`, "" if that is not a number."""
    quoted = isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,12}", value)
    if isinstance(value, float) and math.isfinite(value):
        value = round(value)
    elif quoted:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return ""
    return f"nearest: {min(max(value, least), most)}" + (", without quotes" if quoted else "")


def _nearest_heads(heads: int, kv_heads: int, hidden: int) -> int | None:
    """The multiple of `kv_heads` closest to `heads` that divides `hidden` (0: any); None if there is none."""
    if not hidden:
        return max(1, round(heads / kv_heads)) * kv_heads
    fitting = [n for n in divisors(hidden) if n % kv_heads == 0]
    return min(fitting, key=lambda n: (abs(n - heads), n)) if fitting else None
