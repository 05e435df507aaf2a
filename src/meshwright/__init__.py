"""Meshwright: one job file in; a planned, proven, distributed training run and a served stream out.

Names are loaded on first use, so that `import meshwright` costs nothing:

    from meshwright import load_job, make_plan, verbs
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: Public name -> the module that it is loaded from.
_HOMES = {
    "Job": "meshwright.job",
    "load_job": "meshwright.job",
    "job_to_toml": "meshwright.job",
    "json_schema": "meshwright.job",
    "Card": "meshwright.card",
    "Cluster": "meshwright.cluster",
    "Layout": "meshwright.layout",
    "RunFolder": "meshwright.run",
    "make_plan": "meshwright.plan",
    "MeshwrightError": "meshwright.errors",
    "InputError": "meshwright.errors",
    "CannotWork": "meshwright.errors",
    "RunFailed": "meshwright.errors",
    "LayoutsDisagree": "meshwright.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"meshwright has no {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
