"""Profiles from measurements: of cases, of a run, of this machine."""

from meshwright.plan.calibrate.from_cases import calibrate
from meshwright.plan.calibrate.from_machine import machine_profile
from meshwright.plan.calibrate.from_run import TrainedRun, run_profile

__all__ = ["TrainedRun", "calibrate", "machine_profile", "run_profile"]
