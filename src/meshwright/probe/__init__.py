"""Measures this machine: `measure` times arithmetic, memory, links and disk; `machine` what training is made of, for
`calibrate`; `diagnose` is what `doctor` prints."""

from meshwright.probe.doctor import diagnose
from meshwright.probe.machine import machine
from meshwright.probe.speeds import Speeds, measure

__all__ = ["Speeds", "diagnose", "machine", "measure"]
