"""The answer: a Plan of frozen parts, and its JSON, the contract that everything after planning reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.layout import Layout
from meshwright.plan.memory import StageMemory
from meshwright.plan.schedule import Timeline, actions, replay

#: Fields of a Plan that say what was asked.
ABOUT = ("model", "parameters", "cluster", "device_bytes", "global_batch", "unit")


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of a plan beside model and cluster. `global_batch` is in samples; `pins` are fixed fields of the
    Layout; `precision` is "auto", "fp32" or "bf16"; `compile` is "auto", True or False; `origins` says where
    "layout.tp" and the like were written.
    """

    global_batch: int
    precision: str = "auto"
    pins: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    compile: str | bool = "auto"
    origins: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Place and key for a message: "job.toml:12: layout.tp"."""
        said = self.origins.get(key, "default")
        return key if said in ("default", "Python") else f"{said}: {key}"


@dataclass(frozen=True)
class Interval:
    """A figure with its 90 % interval."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """What a layout is predicted to take. `tokens_per_second` is of the whole cluster, in the model's unit (samples for
    a classifier); `mfu` a fraction of the peak; `dollars` None without a price; `goodput` None where failures are not
    modelled. `breakdown` splits step_seconds.mid into seconds of compute, communication, bubble and optimizer.
    """

    step_seconds: Interval
    peak_bytes: int
    tokens_per_second: float
    mfu: float
    dollars: float | None
    goodput: float | None
    breakdown: Mapping[str, float]


@dataclass(frozen=True)
class Choice:
    """A layout that works, with its prediction. Tuples have an entry a stage; pipeline seconds are of a micro-batch."""

    layout: Layout
    precision: str
    compiled: bool
    micro_batches: int
    stages: tuple[tuple[str, ...], ...]
    predicted: Prediction
    memory: tuple[StageMemory, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    transfer_seconds: float
    binding: str
    why: str

    def timeline(self, most_micro_batches: int | None = None) -> Timeline:
        """The pipeline's schedule in time, one step, without the optimizer; of its first micro-batches where a limit
        is given, since a picture of thousands shows nothing."""
        count = min(self.micro_batches, most_micro_batches or self.micro_batches)
        orders = actions(self.layout.schedule, self.layout.pp, count)
        return replay(orders, self.forward_seconds, self.backward_seconds, self.transfer_seconds)

    def as_dict(self) -> dict[str, Any]:
        p = self.predicted
        seconds = {name: getattr(p.step_seconds, name) for name in ("low", "mid", "high")}
        figures = ("peak_bytes", "tokens_per_second", "mfu", "dollars", "goodput")
        return {
            "layout": self.layout.as_dict(),
            "precision": self.precision,
            "compiled": self.compiled,
            "micro_batches": self.micro_batches,
            "stages": [list(stage) for stage in self.stages],
            "predicted": {
                "step_seconds": seconds,
                **{name: getattr(p, name) for name in figures},
                "breakdown": dict(p.breakdown),
            },
            "memory": [stage.as_dict() for stage in self.memory],
            "pipeline": {
                "forward_seconds": list(self.forward_seconds),
                "backward_seconds": list(self.backward_seconds),
                "transfer_seconds": self.transfer_seconds,
            },
            "binding": self.binding,
            "why": self.why,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Choice:
        predicted = dict(data["predicted"])
        interval = Interval(**predicted.pop("step_seconds"))
        pipeline = data["pipeline"]
        return Choice(
            layout=Layout(**data["layout"]),
            precision=data["precision"],
            compiled=data["compiled"],
            micro_batches=data["micro_batches"],
            stages=tuple(tuple(stage) for stage in data["stages"]),
            predicted=Prediction(step_seconds=interval, **predicted),
            memory=tuple(StageMemory(**stage) for stage in data["memory"]),
            forward_seconds=tuple(pipeline["forward_seconds"]),
            backward_seconds=tuple(pipeline["backward_seconds"]),
            transfer_seconds=pipeline["transfer_seconds"],
            binding=data["binding"],
            why=data["why"],
        )


@dataclass(frozen=True)
class Rejected:
    """A layout that lost before it ran: it breaks a rule or does not fit."""

    layout: Layout
    reason: str


@dataclass(frozen=True)
class Plan:
    """The layout chosen, those that came next, those that cannot be, and what had to be supposed (`assumed`).

    The rest says what was asked, so that a plan can be read alone: the model and its parameters, the devices in words
    and the memory of one, the global batch, and the `unit` that speed counts ("tokens" or "samples").
    """

    chosen: Choice
    runners_up: tuple[Choice, ...]
    rejected: tuple[Rejected, ...]
    assumed: tuple[str, ...]
    model: str
    parameters: int
    cluster: str
    device_bytes: int
    global_batch: int
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """The contract's JSON: equal plans give equal text."""
        return {
            "chosen": self.chosen.as_dict(),
            "runners_up": [choice.as_dict() for choice in self.runners_up],
            "rejected": [{"layout": lost.layout.as_dict(), "reason": lost.reason} for lost in self.rejected],
            "assumed": list(self.assumed),
            **{name: getattr(self, name) for name in ABOUT},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "plan.json") -> Plan:
        """The plan of a run folder. Raises InputError when the JSON is not one."""
        try:
            return Plan(
                chosen=Choice.from_dict(data["chosen"]),
                runners_up=tuple(Choice.from_dict(choice) for choice in data["runners_up"]),
                rejected=tuple(Rejected(Layout(**lost["layout"]), lost["reason"]) for lost in data["rejected"]),
                assumed=tuple(data["assumed"]),
                **{name: data[name] for name in ABOUT},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(Problem(where, f"not a plan ({error})", "make it again with `meshwright plan`")) from error

    def __str__(self) -> str:
        return json.dumps(self.as_dict(), indent=2)
