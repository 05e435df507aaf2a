"""The request of a plan: all but model and cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwright.plan.reliability import Reliability

OBJECTIVES = ("time", "money")


@dataclass(frozen=True)
class PlanRequest:
    """What a plan needs beside model and cluster. `global_batch` is in samples; `pins` are fixed fields of the Layout;
    `precision` is "auto", "fp32" or "bf16"; `compile` is "auto", True or False; `origins` says where a key such as
    "layout.tp" was written. The objective "time" uses every device, "money" may use fewer. `framework` is the name of
    the one that runs the plan. `spot`: the devices can be reclaimed.
    """

    global_batch: int
    precision: str = "auto"
    pins: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    compile: str | bool = "auto"
    origins: Mapping[str, str] = field(default_factory=dict)
    objective: str = "time"
    framework: str = "meshwright"
    spot: bool = False
    failures_per_1000_node_days: float | None = None  # None: as published
    checkpoint_every: int | None = None  # steps; 0: only at the end; None: the best interval
    asynchronous: bool = True  # training goes on while a checkpoint is written

    @property
    def reliability(self) -> Reliability:
        """How often nodes fail: the job's own rate, else the published ones."""
        rate = self.failures_per_1000_node_days
        return Reliability() if rate is None else Reliability(rate, rate, rate)

    def where(self, key: str) -> str:
        """Place and key for a message: "job.toml:12: layout.tp"."""
        origin = self.origins.get(key, "default")
        return key if origin in ("default", "Python") else f"{origin}: {key}"
