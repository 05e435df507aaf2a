"""Tasks: the meaning of a batch. `tasks.get("language-model")` has inputs, targets, loss, count and metrics."""

from __future__ import annotations

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.tasks.classification import Classification
from meshwright.tasks.language_model import LanguageModel
from meshwright.tasks.task import Task, Totals

__all__ = ["TASKS", "Task", "Totals", "get"]

#: Every task by the `task.name` of a job.
TASKS: dict[str, Task] = {task.name: task for task in (LanguageModel(), Classification())}


def get(name: str) -> Task:
    """The task called `name`. Raises InputError naming the nearest."""
    if name not in TASKS:
        raise InputError(Problem("task.name", f"there is no task {name!r}", nearest_name(name, list(TASKS))))
    return TASKS[name]
