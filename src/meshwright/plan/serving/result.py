"""The serving plan: replicas, their split, sequences at once, and the speed that a caller will see; and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.plan.result import Interval
from meshwright.plan.serving.memory import ServingMemory

#: The default request: tokens of the prompt and of the answer.
USUAL_PROMPT_TOKENS, USUAL_OUTPUT_TOKENS = 512, 128
#: Part of a step -> its words.
BINDING = {
    "weights": "reading the weights",
    "cache": "reading keys and values",
    "compute": "arithmetic",
    "launch": "starting kernels",
    "collectives": "all-reduces between tensor-parallel ranks",
    "hops": "hand-overs between pipeline stages",
    "host": "scheduling and sampling",
}


@dataclass(frozen=True)
class Target:
    """The goals of a server; None is no goal. Times are means: to the first token, including the queue, and between two
    tokens. Without `requests_per_second` the devices are kept busy."""

    prompt_tokens: int = USUAL_PROMPT_TOKENS
    output_tokens: int = USUAL_OUTPUT_TOKENS
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    requests_per_second: float | None = None

    @property
    def goals(self) -> tuple[str, ...]:
        """Keys of the goals."""
        keys = ("ttft_seconds", "tpot_seconds", "requests_per_second")
        return tuple(key for key in keys if getattr(self, key) is not None)

    def without(self, key: str) -> Target:
        """The target without one goal."""
        goals = {name: None if name == key else getattr(self, name) for name in self.goals}
        return Target(self.prompt_tokens, self.output_tokens, **goals)

    def missed(self, ttft_seconds: float, tpot_seconds: float) -> tuple[str, ...]:
        """Keys of the times that are not met."""
        times = {"ttft_seconds": ttft_seconds, "tpot_seconds": tpot_seconds}
        return tuple(key for key, value in times.items() if (most := getattr(self, key)) is not None and value > most)


@dataclass(frozen=True)
class ServingPins:
    """Fixed settings; None is planned. `max_len` counts tokens of prompt and answer together."""

    tp: int | None = None
    pp: int | None = None
    max_batch: int | None = None
    max_len: int | None = None
    precision: str | None = None
    attention_dp: bool | None = None


@dataclass(frozen=True)
class ServingFigures:
    """Predicted figures: the times of a request, and the others of all replicas together. `dollars_per_million_tokens`
    counts output tokens; None without a price."""

    ttft_seconds: Interval
    tpot_seconds: Interval
    tokens_per_second: Interval
    requests_per_second: Interval
    dollars_per_million_tokens: float | None
    sequences: float
    utilisation: float


@dataclass(frozen=True)
class ServingChoice:
    """A way to serve that works. `max_batch` and `sequences` are per replica; `breakdown` splits the seconds between
    two tokens. With `attention_dp` the `tp` ranks split the experts, and for attention the sequences."""

    tp: int
    pp: int
    replicas: int
    attention_dp: bool
    precision: str
    max_batch: int
    max_len: int
    memory: ServingMemory
    predicted: ServingFigures
    breakdown: Mapping[str, float]
    binding: str
    why: str

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.replicas

    def __str__(self) -> str:
        words = [f"tp{self.tp}"] + ([f"pp{self.pp}"] if self.pp > 1 else [])
        if self.attention_dp:
            words.append("attention-dp")
        if self.replicas > 1:
            words.append(f"x{self.replicas}")
        return " ".join([*words, self.precision, f"batch{self.max_batch}"])

    def as_dict(self) -> dict[str, Any]:
        plain = ("tp", "pp", "replicas", "devices", "attention_dp", "precision", "max_batch", "max_len")
        return {
            **{name: getattr(self, name) for name in plain},
            "memory": asdict(self.memory),
            "predicted": asdict(self.predicted),
            "breakdown": dict(self.breakdown),
            "binding": self.binding,
            "why": self.why,
        }


@dataclass(frozen=True)
class ServingPlan:
    """The chosen way, the runners-up, the rejected ways with reasons, and the assumptions."""

    chosen: ServingChoice
    runners_up: tuple[ServingChoice, ...]
    rejected: tuple[tuple[str, str], ...]  # (way, reason)
    assumed: tuple[str, ...]
    target: Target
    model: str
    parameters: int
    cluster: str
    engine: str

    def as_dict(self) -> dict[str, Any]:
        """Equal plans give equal JSON."""
        return {
            "chosen": self.chosen.as_dict(),
            "runners_up": [choice.as_dict() for choice in self.runners_up],
            "rejected": [{"way": way, "reason": reason} for way, reason in self.rejected],
            "assumed": list(self.assumed),
            "target": asdict(self.target),
            **{name: getattr(self, name) for name in ("model", "parameters", "cluster", "engine")},
        }

    def __str__(self) -> str:
        return json.dumps(self.as_dict(), indent=2)
