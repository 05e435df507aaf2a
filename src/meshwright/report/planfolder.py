"""A plan as a folder of files: the plan itself, its page, its timeline, and its configuration for other frameworks."""

from __future__ import annotations

from pathlib import Path

from meshwright.plan import Plan
from meshwright.report.exports import EXPORTERS
from meshwright.report.html import plan_page
from meshwright.report.timeline import MOST_IN_TRACE, chrome_trace, timeline_svg
from meshwright.report.training_words import Recipe
from meshwright.report.written import write_files

#: The record of what plans wrote into a folder.
RECORD = "written.json"


def plan_files(plan: Plan, recipe: Recipe) -> dict[str, str]:
    """The text of every file, by name. A batch that groups of devices share unevenly has no configuration for other
    frameworks, which cannot express it."""
    layout = plan.chosen.layout
    files = {
        "plan.json": f"{plan}\n",
        "plan.html": plan_page(plan),
        "timeline.svg": timeline_svg(plan.chosen),
        "timeline.trace.json": chrome_trace(plan.chosen, layout.devices // layout.pp, MOST_IN_TRACE),
    }
    for exporter in () if plan.has_batch_shares else EXPORTERS.values():
        files |= exporter(plan, recipe).files
    return files


def write_plan(plan: Plan, recipe: Recipe, folder: str | Path) -> list[Path]:
    """Write `plan_files` into a folder, which is created if need be, and return their paths.

    Replaces all files of an earlier plan there, or none if a write fails. Raises InputError, before anything is
    replaced, where a file of the same name was not written by a plan or was changed since.
    """
    return write_files(plan_files(plan, recipe), folder, record=RECORD, writer="plan")
