"""Meshwright: from one job file to a planned, verified, distributed training run and a served model.

Names are loaded on first use, so that `import meshwright` costs nothing:

    from meshwright import load_job, make_plan, verbs
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

if sys.platform != "linux":
    # Here, before anything else is imported: its modules need what only Linux has (/proc, control groups, memfd).
    raise ImportError(
        f"Meshwright runs on Linux alone, and this system is {sys.platform!r}; "
        "nearest: a Linux machine, virtual machine or container (on Windows, WSL 2)"
    )

__version__ = "0.1.0"

#: Public name -> module.
_MODULES = {
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

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"meshwright has no {name!r}; it has {', '.join(_MODULES)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
