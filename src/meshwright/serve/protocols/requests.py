"""The requests of clients: every field is checked, and every unknown field is refused by name.

Bodies are not trusted: JSON without NaN, repeated keys or deep nesting, numbers that are numbers (not true or "1"),
valid Unicode. A field of OpenAI's API that this server does not support is refused unless its value changes nothing.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from meshwright.errors import nearest_name
from meshwright.files import decode_text
from meshwright.serve.errors import RequestError, bad_request
from meshwright.serve.workers.request import GenerationRequest

Body = TypeVar("Body", bound=BaseModel)

MAX_JSON_DEPTH = 8
MAX_CHOICES = 64

#: Field of OpenAI's API that is not supported -> the values that change nothing, which are accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None,),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "metadata": (None, {}),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
#: The same for the fields of a message, of a part of its content, and of stream_options.
UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "refusal": (None,),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
}
UNSUPPORTED_IN_PART: dict[str, tuple[Any, ...]] = {"annotations": (None, []), "cache_control": (None,)}
UNSUPPORTED_IN_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (None, False)}


def parse_object(body: bytes) -> dict[str, Any]:
    """`body` as a JSON object. Raises RequestError (400) for anything else."""
    try:
        text = text_of(body, "the body", code="invalid_json")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except RecursionError:
        raise bad_request(f"the body is nested more than {MAX_JSON_DEPTH} deep", code="invalid_json") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise bad_request(f"the body is not JSON: {error.msg} at {where}", code="invalid_json") from None
    except ValueError:  # an integer of thousands of digits
        raise bad_request("the body holds a number that is too long", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object", code="invalid_json")
    _check_depth(value)
    return value


def text_of(data: bytes, what: str, *, param: str | None = None, code: str = "invalid_value") -> str:
    """`data`, which a client sent as `what`, as text. Raises RequestError (400) if it is not UTF-8."""
    try:
        return decode_text(data)
    except UnicodeDecodeError:
        raise bad_request(f"{what} is not UTF-8", param=param, code=code) from None
    except ValueError as error:
        raise bad_request(f"{what} {error}", param=param, code=code) from None


def _no_constant(name: str) -> float:
    raise bad_request(f"the body holds {name}, which is not a JSON number", code="invalid_json")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise bad_request("the body names a field twice", code="invalid_json")
    return fields


def _check_depth(value: Any) -> None:
    """Checks the depth without recursion, and refuses lone surrogates, which no tokenizer accepts."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not _is_unicode(item):
                raise bad_request("the body holds a text that is not valid Unicode", code="invalid_json")
        level = below
        if not level:
            return
    raise bad_request(f"the body is nested more than {MAX_JSON_DEPTH} deep", code="invalid_json")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text, texts, token ids, or lists of token ids -> prompts. The engine checks the range of ids."""
    items = value if isinstance(value, list) and value and type(value[0]) is not int else [value]
    if len(items) > MAX_CHOICES:
        raise ValueError(f"holds {len(items)} prompts; at most {MAX_CHOICES}")
    if all(isinstance(item, str) for item in items):
        return tuple(items)
    # type() and not isinstance: True is an int
    if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in items):
        return tuple(tuple(item) for item in items)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _content(value: Any) -> Any:
    """A text, or a list of {"type": "text", "text": ...} parts, joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError('holds a part that is not {"type": "text", "text": ...}; only text is supported')
        part = _supported(part, UNSUPPORTED_IN_PART)
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('a text part has the fields "type" and "text"')
        texts.append(part["text"])
    return "\n".join(texts)


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, fields: Any) -> Any:
        return _supported(fields, UNSUPPORTED_IN_STREAM_OPTIONS) if isinstance(fields, dict) else fields


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, fields: Any) -> Any:
        return _supported(fields, UNSUPPORTED_IN_MESSAGE) if isinstance(fields, dict) else fields


class _Sampling(_Strict):
    """The fields of completions and chat; an absent or null field has OpenAI's default."""

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(_stops)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _generation(
        self, prompt: str | tuple[int, ...], choice: int, *, max_tokens: int | None, add_special: bool
    ) -> GenerationRequest:
        """The request for one choice. With a seed, the choices differ and are reproducible."""
        return GenerationRequest(
            prompt=prompt,
            add_special=add_special,
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),  # -1 is how some clients write "off"
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63),
            stop=tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(_Sampling):
    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_prompts)]

    def generations(self) -> list[GenerationRequest]:
        """One request per choice, in the order of the answer's indexes: n for each prompt in turn."""
        limit = 16 if self.max_tokens is None else self.max_tokens
        each = self.n or 1
        _check_choices(len(self.prompt) * each)
        prompts = [prompt for prompt in self.prompt for _ in range(each)]
        return [self._generation(p, c, max_tokens=limit, add_special=True) for c, p in enumerate(prompts)]


class ChatRequest(_Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None

    def plain_messages(self) -> list[dict[str, str]]:
        """Messages for the template, which calls OpenAI's role "developer" "system"."""
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in self.messages]

    def generations(self, prompt: str, *, add_special: bool) -> list[GenerationRequest]:
        """One request per choice for the rendered `prompt`; without a limit it may fill the model's context."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise bad_request("max_tokens and max_completion_tokens mean the same; send one", param="max_tokens")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return [self._generation(prompt, c, max_tokens=limit, add_special=add_special) for c in range(self.n or 1)]


def _check_choices(count: int) -> None:
    if count > MAX_CHOICES:
        raise bad_request(f"prompts x n is {count}; at most {MAX_CHOICES} per request", param="n")


def read_request(kind: type[Body], fields: dict[str, Any]) -> Body:
    """`fields` as a `kind`. Raises RequestError (400) naming the first problem and the nearest name that works."""
    unsupported = {name: neutrals for name, neutrals in UNSUPPORTED.items() if name not in kind.model_fields}
    try:
        return kind.model_validate(_supported(fields, unsupported))
    except pydantic.ValidationError as error:
        raise _first_problem(kind, error) from None


def _supported(fields: dict[str, Any], unsupported: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """`fields` without unsupported ones that change nothing. Raises RequestError (400) naming one that would."""
    for name, value in fields.items():
        if name in unsupported and not _neutral(value, unsupported[name]):
            raise bad_request(
                f"'{name}' is not supported by this server; leave it out", param=name, code="unsupported_field"
            )
    return {name: value for name, value in fields.items() if name not in unsupported}


def _neutral(value: Any, neutrals: tuple[Any, ...]) -> bool:
    """Whether `value` equals one of `neutrals`, where False is not 0 and True is not 1."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in neutrals)


def _first_problem(kind: type[BaseModel], error: pydantic.ValidationError) -> RequestError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        name = path[-1][:64]
        inner: dict[str, type[BaseModel]] = {"messages": Message, "stream_options": StreamOptions}
        owner = inner.get(path[0], kind) if len(path) > 1 else kind
        known = nearest_name(name, list(owner.model_fields))
        return bad_request(f"unknown field '{name}'; {known}", param=name, code="unknown_field")
    shown = ".".join(part[:64] for part in path if not part.startswith(("list[", "function-")))
    message = problem["msg"].removeprefix("Value error, ")
    return bad_request(f"{shown}: {message}" if shown else message, param=shown or None)
