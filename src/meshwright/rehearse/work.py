"""The functions that `rehearse` and the measurements run in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from meshwright.errors import CannotWork, Problem
from meshwright.job import load_job
from meshwright.launch import Context
from meshwright.layout import Execution, Layout
from meshwright.rehearse.stage import TrackedRun, allocated_bytes, measured_peaks, rehearsed_peak


def rehearse(payload: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """The peak of each of `payload["ranks"]`, rehearsed one after another in this process.

    Raises CannotWork for a model whose shapes depend on the values of its input.
    """
    torch.set_num_threads(1)
    run = tracked_run(payload)
    try:
        return [rehearsed_peak(run, rank).as_dict() for rank in payload["ranks"]]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = f"cannot be rehearsed: one of its shapes depends on values ({error})"
        raise CannotWork(Problem("model", what, "leave out --exact: the plan then uses its formula")) from error


def measure(payload: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """The peak of this rank in a real run of each of `payload["cases"]`, in which all ranks take part.

    It is the least of `payload["steps"]` steps: on a CPU the thread of a collective sometimes frees its tensors late.
    With `payload["allocator"]` each answer also has `allocator_bytes`, from another run without a tracker.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    answers = []
    for number, case in enumerate(payload["cases"]):
        run = tracked_run(case)
        peaks = measured_peaks(run, context, payload["steps"], name=f"case-{number}")
        answer = min(peaks, key=lambda peak: peak.total).as_dict()
        if payload.get("allocator"):
            answer["allocator_bytes"] = allocated_bytes(run, context, name=f"case-{number}-allocator")
        answers.append(answer)
    return answers


def tracked_run(payload: Mapping[str, Any]) -> TrackedRun:
    """The inverse of `payload_of`, without compilation."""
    job = load_job(Path(payload["job"]), data_must_exist=False)
    stages = tuple(tuple(stage) for stage in payload["stages"])
    return TrackedRun(job, Execution(Layout(**payload["layout"]), stages, payload["precision"]), payload["kind"])
