"""`doctor`: what this machine has."""

from __future__ import annotations

from typing import Any


def doctor() -> dict[str, Any]:
    """What this machine has, its speeds, and every socket that Meshwright listens on."""
    from meshwright import probe

    return probe.diagnose()
