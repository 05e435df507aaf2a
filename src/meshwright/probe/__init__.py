"""Measures this machine: `measure` times arithmetic, memory, links and disk; `diagnose` is what `doctor` prints."""

from meshwright.probe.doctor import diagnose
from meshwright.probe.speeds import Speeds, measure

__all__ = ["Speeds", "diagnose", "measure"]
