"""The workload: a model, a cluster, a batch, a precision and a framework; only the layout is open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.layout import Layout
from meshwright.plan.rules import FRAMEWORKS, Framework, LayoutQuery, ModelFacts


@dataclass(frozen=True)
class Workload:
    """A step of `global_batch` samples of the model `card` on `cluster`, run by `framework`. Matrix products are in
    `precision` ("fp32", "bf16", ...; never "auto"). `asynchronous`: checkpoints are written while training goes on."""

    card: Card
    cluster: Cluster
    global_batch: int
    precision: str
    framework: Framework = FRAMEWORKS["meshwright"]
    asynchronous: bool = False

    @cached_property
    def facts(self) -> ModelFacts:
        return ModelFacts.of(self.card)

    @cached_property
    def key(self) -> str:
        """Equal for equal workloads of one card."""
        options = (self.global_batch, self.precision, self.framework, self.asynchronous)
        return repr((self.card.name, id(self.card), self.cluster, *options))

    def query(self, layout: Layout) -> LayoutQuery:
        """The question to the rules: may this workload have `layout`?"""
        return LayoutQuery(layout, self.facts, self.cluster.devices, self.global_batch, self.framework)
