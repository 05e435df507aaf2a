"""What is asked of a plan beside model and cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshwright.plan.reliability import Reliability

OBJECTIVES = ("time", "money")


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of a plan beside model and cluster. `global_batch` is in samples; `pins` are fixed fields of the
    Layout; `precision` is "auto", "fp32" or "bf16"; `compile` is "auto", True or False; `origins` says where
    "layout.tp" and the like were written. `objective` is "time", which uses every device, or "money", which may use
    fewer; `framework` is the name of the one that will run it. `spot`: on capacity that can be reclaimed.
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
    checkpoint_every: int | None = None  # steps; 0: at the end; None: as is best
    asynchronous: bool = True  # training goes on while a checkpoint is written

    @property
    def reliability(self) -> Reliability:
        """How often nodes fail: as the job says, else as is usual."""
        said = self.failures_per_1000_node_days
        return Reliability() if said is None else Reliability(said, said, said)

    def where(self, key: str) -> str:
        """Place and key for a message: "job.toml:12: layout.tp"."""
        said = self.origins.get(key, "default")
        return key if said in ("default", "Python") else f"{said}: {key}"
