"""Measures this machine: `measure` its arithmetic, memory, links and disk; `machine` the parts of a training step, for
`calibrate`; `diagnose` describes it for `doctor`."""

from meshwright.probe.doctor import diagnose
from meshwright.probe.machine import machine
from meshwright.probe.speeds import Speeds, measure

__all__ = ["Speeds", "diagnose", "machine", "measure"]
