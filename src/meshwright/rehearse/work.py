"""What the processes run that `rehearse` and the measurements start, by name."""

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
from meshwright.rehearse.stage import TrackedRun, allocated, measured, rehearsed


def rehearse(payload: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """The peak of each of `payload["ranks"]`, rehearsed one after the other in this process.

    Raises CannotWork for a model whose shapes depend on the values of its input.
    """
    torch.set_num_threads(1)
    run = tracked_run(payload)
    try:
        return [rehearsed(run, rank).as_dict() for rank in payload["ranks"]]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = f"cannot be rehearsed: a shape in it depends on values ({error})"
        raise CannotWork(Problem("model", what, "leave out --exact: the formula needs no rehearsal")) from error


def measure(payload: Mapping[str, Any], context: Context) -> list[dict[str, Any]]:
    """The peak of this rank in a real run of each of `payload["questions"]`, all ranks taking part in all of them.

    Of `payload["steps"]` steps it is the one with the least: on a CPU a collective's thread lets go of its tensors a
    moment late, now and then. With `payload["allocator"]` each answer also has `allocator_bytes`, of another run
    without a tracker.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    answers = []
    for number, question in enumerate(payload["questions"]):
        run, store = tracked_run(question), context.store_path.with_name(f"store-{number}")
        answer = min(measured(run, context.rank, store, payload["steps"]), key=lambda peak: peak.total).as_dict()
        if payload.get("allocator"):
            again = store.with_name(f"{store.name}-allocator")
            answer["allocator_bytes"] = allocated(run, context.rank, again)
        answers.append(answer)
    return answers


def tracked_run(payload: Mapping[str, Any]) -> TrackedRun:
    """The inverse of `ask.question`; nothing is compiled."""
    job = load_job(Path(payload["job"]), data_must_exist=False)
    stages = tuple(tuple(stage) for stage in payload["stages"])
    return TrackedRun(job, Execution(Layout(**payload["layout"]), stages, payload["precision"]), payload["kind"])
