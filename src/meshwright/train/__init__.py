"""Trains a job by its plan: `work` is what every process of a run calls."""

from meshwright.train.work import work

__all__ = ["work"]
