"""The answer: a Plan of frozen parts, and its JSON, the contract that everything after planning reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem
from meshwright.files import read_object
from meshwright.layout import Execution, Layout
from meshwright.plan.cost import StageMemory
from meshwright.plan.pipeline.actions import actions, micro_batches_to_draw, stage_ranks
from meshwright.plan.pipeline.replay import Timeline, replay
from meshwright.plan.reliability import RunForecast

LARGEST_FILE_BYTES = 1 << 28
#: Fields of a Plan that describe the question.
ABOUT = ("model", "parameters", "cluster", "device_bytes", "global_batch", "unit")


@dataclass(frozen=True)
class Interval:
    """A figure with its 90 % interval."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """The predicted figures of a layout. `tokens_per_second` is of the whole cluster, in the model's unit (samples for
    a classifier); `mfu` a fraction of the peak; `dollars` of the whole run, None without a price or steps; `goodput`
    None where failures are not modelled. `breakdown` has the seconds of step_seconds.mid by cause,
    `intervals` the 90 % bounds of the other figures."""

    step_seconds: Interval
    peak_bytes: int
    tokens_per_second: float
    mfu: float
    dollars: float | None
    goodput: float | None
    breakdown: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def with_figures(self, **figures: float) -> Prediction:
        """The prediction with other figures, each with the relative interval of the one it replaces."""
        times = {name: value / getattr(self, name) for name, value in figures.items() if name in self.intervals}
        scaled = {
            name: (low * times.get(name, 1.0), high * times.get(name, 1.0))
            for name, (low, high) in self.intervals.items()
        }
        return replace(self, intervals=scaled, **figures)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Choice(Execution):
    """A layout that works, with its prediction. Tuples have one entry per (virtual) stage, `memory` one per rank of the
    pipeline. Pipeline seconds are per micro-batch; transfers have one entry per boundary between virtual stages, or one
    figure for all, and `overlapped` says whether they run beside the work. `level` marks a runner-up that the plan's
    margin of error cannot tell from the winner."""

    micro_batches: int
    predicted: Prediction
    memory: tuple[StageMemory, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    transfer_seconds: float | tuple[float, ...]
    binding: str
    why: str
    level: bool = False
    weight_seconds: tuple[float, ...] = ()  # the part of the backward that computes weights' gradients
    overlapped: bool = True

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether its processes are to keep the host's memory that they free: where slack is counted for that."""
        return all(stage.slack > 0 for stage in self.memory)

    def parts(self, rank: int) -> tuple[tuple[str, ...], ...]:
        """The blocks of each virtual stage on one rank of the pipeline."""
        if self.layout.pp == 1:
            return self.stages
        home = stage_ranks(self.layout.schedule, self.layout.pp, self.layout.vpp)
        return tuple(blocks for blocks, at in zip(self.stages, home, strict=True) if at == rank)

    def timeline(self, most_micro_batches: int | None = None) -> Timeline:
        """One step of the pipeline's schedule in time, without the optimizer; with a limit, only its first
        micro-batches, since a picture of thousands shows nothing."""
        how = self.layout.schedule if self.layout.pp > 1 else "1f1b", self.layout.pp
        most = most_micro_batches or self.micro_batches
        count = micro_batches_to_draw(*how, self.micro_batches, most, self.layout.vpp)
        orders = actions(*how, count, self.layout.vpp)
        weight = self.weight_seconds or None
        seconds = self.forward_seconds, self.backward_seconds, self.transfer_seconds
        return replay(orders, *seconds, weight_seconds=weight, overlapped=self.overlapped)

    def as_dict(self) -> dict[str, Any]:
        p = self.predicted
        figures = ("peak_bytes", "tokens_per_second", "mfu", "dollars", "goodput")
        return {
            "layout": self.layout.as_dict(),
            "precision": self.precision,
            "compiled": self.compiled,
            "micro_batches": self.micro_batches,
            "stages": [list(stage) for stage in self.stages],
            "predicted": {
                "step_seconds": asdict(p.step_seconds),
                **{name: getattr(p, name) for name in figures},
                "intervals": {name: list(bounds) for name, bounds in p.intervals.items()},
                "breakdown": dict(p.breakdown),
            },
            "memory": [stage.as_dict() for stage in self.memory],
            "pipeline": {
                "forward_seconds": list(self.forward_seconds),
                "backward_seconds": list(self.backward_seconds),
                "weight_seconds": list(self.weight_seconds),
                "transfer_seconds": self.transfer_seconds,
                "overlapped": self.overlapped,
            },
            "binding": self.binding,
            "why": self.why,
            "level": self.level,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Choice:
        predicted = dict(data["predicted"])
        interval = Interval(**predicted.pop("step_seconds"))
        bounds = {name: (low, high) for name, (low, high) in predicted.pop("intervals", {}).items()}
        pipeline, between = data["pipeline"], data["pipeline"]["transfer_seconds"]
        return Choice(
            layout=Layout(**data["layout"]),
            precision=data["precision"],
            compiled=data["compiled"],
            micro_batches=data["micro_batches"],
            stages=tuple(tuple(stage) for stage in data["stages"]),
            predicted=Prediction(step_seconds=interval, intervals=bounds, **predicted),
            memory=tuple(StageMemory(**stage) for stage in data["memory"]),
            forward_seconds=tuple(pipeline["forward_seconds"]),
            backward_seconds=tuple(pipeline["backward_seconds"]),
            transfer_seconds=tuple(between) if isinstance(between, list | tuple) else between,
            binding=data["binding"],
            why=data["why"],
            level=data.get("level", False),
            weight_seconds=tuple(pipeline.get("weight_seconds", ())),
            overlapped=pipeline.get("overlapped", True),
        )


@dataclass(frozen=True)
class RejectedLayout:
    """A layout that cannot work or loses, and why. It stands for `count` layouts: in a large space, one layout, the
    nearest to working, stands for all of the same degrees that fail in the same way."""

    layout: Layout
    reason: str
    count: int = 1


@dataclass(frozen=True)
class WhatIf:
    """What a change would do: `change` in words ("global_batch=32"), the layout and the step that it leads to, and
    `saves`, the share of the time per sample that it saves (with the objective "money", of the price)."""

    change: str
    layout: Layout
    step_seconds: float
    saves: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "layout": self.layout.as_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> WhatIf:
        return WhatIf(**{**data, "layout": Layout(**data["layout"])})


@dataclass(frozen=True)
class Share:
    """What one group of a mixed cluster does: its `devices` run the pipeline stages from `first_stage` up to, but not
    including, `stop_stage`, on `samples` of each global batch in micro-batches of `micro_batch`; `why` in words."""

    group: str
    devices: int
    first_stage: int
    stop_stage: int
    samples: int
    micro_batch: int
    peak_bytes: int
    why: str

    @property
    def stages(self) -> str:
        """The group's stages in words."""
        last = self.stop_stage - 1
        return f"stage {last}" if last <= self.first_stage else f"stages {self.first_stage} to {last}"


@dataclass(frozen=True)
class Plan:
    """The chosen layout, the runners-up, the rejected layouts, and the assumptions (`assumed`).

    `considered` counts layouts: "space" is all within the bounds of the search, and each of these was "estimated"
    ("missed" counts those of them that did not fit), "pruned" by a bound on its step, "costlier" than one that fits
    (more recompute than needed), or "too_large" because a leaner one did not fit. `buys` says what changes would save,
    `limit` what holds the plan back, in words, `outlook` what failures and prices do to the run. `shares` is empty
    unless the cluster has several kinds of device. The other fields repeat the question, so that a plan can be read
    alone: the model and its parameters, the devices in words and the memory of one, the global batch, and the `unit`
    that speed counts ("tokens" or "samples").
    """

    chosen: Choice
    runners_up: tuple[Choice, ...]
    rejected: tuple[RejectedLayout, ...]
    assumed: tuple[str, ...]
    model: str
    parameters: int
    cluster: str
    device_bytes: int
    global_batch: int
    unit: str
    objective: str = "time"
    framework: str = "meshwright"
    limit: str = ""
    considered: Mapping[str, int] = field(default_factory=dict)
    buys: tuple[WhatIf, ...] = ()
    outlook: RunForecast | None = None
    shares: tuple[Share, ...] = ()

    @property
    def has_batch_shares(self) -> bool:
        """Whether groups of devices have different shares of the batch, which no single layout can describe."""
        chosen = self.chosen
        return chosen.layout.dp * chosen.layout.micro_batch * chosen.micro_batches != self.global_batch

    def as_dict(self) -> dict[str, Any]:
        """The plan's JSON: equal plans give equal text."""
        return {
            "chosen": self.chosen.as_dict(),
            "runners_up": [choice.as_dict() for choice in self.runners_up],
            "rejected": [
                {"layout": lost.layout.as_dict(), "reason": lost.reason, "count": lost.count} for lost in self.rejected
            ],
            "assumed": list(self.assumed),
            **{name: getattr(self, name) for name in (*ABOUT, "objective", "framework", "limit")},
            "considered": dict(self.considered),
            "buys": [one.as_dict() for one in self.buys],
            "outlook": None if self.outlook is None else self.outlook.as_dict(),
            "shares": [asdict(share) for share in self.shares],
        }

    @staticmethod
    def read(path: Path) -> Plan:
        """The plan in a file. Raises InputError when the file holds none."""
        return Plan.from_dict(read_object(path, LARGEST_FILE_BYTES), str(path))

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "plan.json") -> Plan:
        """The plan of its JSON. Raises InputError when the JSON is no plan."""
        try:
            return Plan(
                chosen=Choice.from_dict(data["chosen"]),
                runners_up=tuple(Choice.from_dict(choice) for choice in data["runners_up"]),
                rejected=tuple(
                    RejectedLayout(Layout(**lost["layout"]), lost["reason"], lost.get("count", 1))
                    for lost in data["rejected"]
                ),
                assumed=tuple(data["assumed"]),
                **{name: data[name] for name in ABOUT},
                **{name: data[name] for name in ("objective", "framework", "limit", "considered") if name in data},
                buys=tuple(WhatIf.from_dict(one) for one in data.get("buys", ())),
                outlook=RunForecast.from_dict(data["outlook"]) if data.get("outlook") else None,
                shares=tuple(Share(**share) for share in data.get("shares", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(Problem(where, f"not a plan ({error})", "make it again with `meshwright plan`")) from error

    def __str__(self) -> str:
        return json.dumps(self.as_dict(), indent=2)
