"""From a Card, a Cluster and a request to a Plan: which layout, whether it fits, how long a step takes. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.layout import Layout
from meshwright.plan.cost import Estimator
from meshwright.plan.request import PlanRequest
from meshwright.plan.result import Choice, Interval, Plan, Prediction, RejectedLayout, Share, WhatIf
from meshwright.plan.rules import FRAMEWORKS, RULES, Framework, LayoutQuery, ModelFacts, Refusal, refusals
from meshwright.plan.search import make_plan
from meshwright.plan.workload import Workload

__all__ = [
    "FRAMEWORKS",
    "RULES",
    "Choice",
    "Framework",
    "Interval",
    "LayoutQuery",
    "ModelFacts",
    "Plan",
    "PlanRequest",
    "Prediction",
    "Refusal",
    "RejectedLayout",
    "Share",
    "WhatIf",
    "Workload",
    "balance",
    "make_plan",
    "refusals",
]


def balance(workload: Workload, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Block names of each of `layout.pp` stages: contiguous, cut so that the slowest stage is as quick as possible."""
    firsts = Estimator(workload).stages(layout)
    names = [block.name for block in workload.card.blocks]
    stops: Sequence[int] = (*firsts[1:], len(names))
    return tuple(tuple(names[start:stop]) for start, stop in zip(firsts, stops, strict=True))
