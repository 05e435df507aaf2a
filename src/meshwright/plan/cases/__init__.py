"""Runs described as JSON lines: read, resolved to a workload and a layout, predicted."""

from meshwright.plan.cases.predict import Predictor, predictions
from meshwright.plan.cases.read import BadCase, MeasuredCase, measured_cases, read_cases

__all__ = ["BadCase", "MeasuredCase", "Predictor", "measured_cases", "predictions", "read_cases"]
