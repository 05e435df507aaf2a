"""Which layout, will it fit, how long: from a Card, a Cluster and a request to a Plan. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.layout import Layout
from meshwright.plan.cost import Estimator
from meshwright.plan.request import PlanRequest
from meshwright.plan.result import Choice, Interval, Plan, Prediction, Rejected, Share, WhatIf
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
    "Rejected",
    "Share",
    "WhatIf",
    "Workload",
    "balance",
    "make_plan",
    "refusals",
]


def balance(workload: Workload, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Names of the contiguous blocks of each of `layout.pp` stages, the slowest stage as quick as can be."""
    firsts = Estimator(workload).stages(layout)
    names = [block.name for block in workload.card.blocks]
    stops: Sequence[int] = (*firsts[1:], len(names))
    return tuple(tuple(names[start:stop]) for start, stop in zip(firsts, stops, strict=True))
