"""What the rules read and return: the facts of a model, a query about a layout, a refusal; what schedules need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meshwright.card import Card
from meshwright.divisors import divisors
from meshwright.layout import AXIS_RULES, Layout
from meshwright.plan.pipeline import TABLE
from meshwright.plan.rules.frameworks import FRAMEWORKS, Framework

#: Fields of the Layout in words.
FIELD_WORDS = {
    "dp": "data parallel",
    "shard": "sharded data parallel",
    "tp": "tensor parallel",
    "pp": "a pipeline",
    "vpp": "an interleaved pipeline",
    "cp": "context parallel",
    "ep": "expert parallel",
    "sequence_parallel": "sequence parallel",
    "offload": "optimizer state in host memory",
}


@dataclass(frozen=True)
class ModelFacts:
    """What the rules need to know of a model. `split_sizes`: for each axis that tensor parallelism splits, the greatest
    common divisor of its sizes. `experts`: the greatest common divisor of the blocks' counts of experts, 0 without.
    `ties_between_blocks`: tied parameters that a pipeline cannot keep equal."""

    blocks: int
    units_per_sample: int
    has_attention: bool
    splittable: frozenset[str]
    split_sizes: Mapping[str, int]
    stateful_buffers: tuple[str, ...]
    experts: int = 0
    ties_between_blocks: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(card: Card) -> ModelFacts:
        sizes = {axis: math.gcd(*sizes) for axis, sizes in card.axis_sizes().items() if AXIS_RULES.get(axis) == "tp"}
        return ModelFacts(
            blocks=len(card.blocks),
            units_per_sample=card.units_per_sample,
            has_attention=any(block.attention for block in card.blocks),
            splittable=card.splittable,
            split_sizes=sizes,
            stateful_buffers=card.stateful_buffers,
            experts=math.gcd(*(block.experts.count for block in card.blocks if block.experts)),
            ties_between_blocks=_ties_between_blocks(card),
        )

    @property
    def stages(self) -> int:
        """The most pipeline stages that it can be cut into."""
        return self.blocks if "pp" in self.splittable and not self.ties_between_blocks else 1

    def sizes_to_divide(self, framework: Framework) -> Mapping[str, int]:
        """Those of `split_sizes` that tp must divide: all but a vocabulary that the framework pads to a multiple."""
        pads = framework.vocab_multiple > 1
        return {axis: size for axis, size in self.split_sizes.items() if not (pads and axis == "vocab")}

    def tensor_parallel_sizes(self, limit: int, framework: Framework) -> list[int]:
        """Every tp up to `limit` that divides each axis that the framework's tensor parallelism splits evenly; [1]
        without a table of axes."""
        if "tp" not in self.splittable:
            return [1]
        sizes = self.sizes_to_divide(framework)
        common = math.gcd(*sizes.values()) if sizes else 1
        return [d for d in divisors(common) if d <= limit]

    def context_parallel_sizes(self, limit: int) -> list[int]:
        """Every cp up to `limit`: a causal sequence is cut into 2 cp equal pieces, an early and a late one per rank, so
        that all ranks have the same work."""
        if not self.has_attention or self.units_per_sample % 2:
            return [1]
        return [1, *(d for d in divisors(self.units_per_sample // 2) if 1 < d <= limit)]

    def expert_parallel_sizes(self) -> tuple[int, ...]:
        """Every ep that divides the experts; (1,) without experts."""
        return divisors(self.experts) if self.experts else (1,)


def _ties_between_blocks(card: Card) -> tuple[tuple[str, str], ...]:
    """Tied parameters, but for those within a block and one pair of the first and the last block: gradients of tied
    parameters are summed over the first and the last stage alone."""
    block_of = {name: name.split(".")[1] for pair in card.tied for name in pair if name.startswith("blocks.")}
    between = tuple(pair for pair in card.tied if len({block_of.get(name) for name in pair}) > 1)
    ends = {card.blocks[0].name, card.blocks[-1].name}
    if len(between) == len(card.tied) == 1 and {block_of.get(name) for name in between[0]} == ends:
        return ()
    return between


@dataclass(frozen=True)
class LayoutQuery:
    """Can this layout run this model on `devices` with `global_batch` samples per step, under this framework?"""

    layout: Layout
    facts: ModelFacts
    devices: int
    global_batch: int
    framework: Framework = FRAMEWORKS["meshwright"]

    def changed(self, change: Mapping[str, Any]) -> LayoutQuery:
        """This query with `change` applied: fields of the Layout, `devices` or `global_batch`."""
        outer = {key: change[key] for key in ("devices", "global_batch") if key in change}
        inner = {key: value for key, value in change.items() if key not in outer}
        return replace(self, layout=replace(self.layout, **inner), **outer)

    def offers(self, name: str) -> bool:
        """Whether the framework lets this field of the Layout leave its default."""
        return name in self.framework.offers.fields

    @property
    def recomputes(self) -> tuple[str, ...]:
        """The words of recompute that the framework offers this model: none to one whose buffers a second forward pass
        would change again, and where "selective" drops attention alone, none of it to models without attention."""
        if self.facts.stateful_buffers:
            return ("none",)
        nothing = self.framework.selective == "attention" and not self.facts.has_attention
        return tuple(word for word in self.framework.offers.recompute if not (nothing and word == "selective"))

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on a rank; 0 where the batch cannot be divided like that."""
        dp, micro = self.layout.dp, self.layout.micro_batch
        if min(dp, micro, self.global_batch) < 1 or self.global_batch % (dp * micro):
            return 0
        return self.global_batch // (dp * micro)


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot work; `change` is the nearest that satisfies the rule, `fields` are those the rule reads."""

    rule: str
    reason: str
    change: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[str, ...] = ()

    @property
    def nearest(self) -> str:
        """The change in keys of the job file: "nearest: layout.tp=2 layout.dp=1"."""
        return "nearest: " + " ".join(f"{job_key(name)}={job_value(value)}" for name, value in self.change.items())


def fills_pipeline(layout: Layout, count: int, framework: Framework) -> bool:
    """Whether `count` micro-batches are enough for the layout's schedule, and whole rounds where it has rounds. In
    pipelines other than torch's, 1F1B runs with any number."""
    if layout.schedule == "1f1b" and not framework.torch_pipeline:
        return True
    return count >= TABLE[layout.schedule].fill * layout.pp and not (in_rounds(layout) and count % layout.pp)


def in_rounds(layout: Layout) -> bool:
    """Whether micro-batches go through the virtual stages in rounds of pp."""
    return layout.schedule == "interleaved" or (layout.schedule == "zb-h1" and layout.vpp > 1)


def not_offered(framework: Framework) -> str:
    """The end of a sentence: "x is not offered by ..."."""
    if framework.name == "meshwright":
        return "not offered yet by meshwright; plan for another framework with --for megatron-lm"
    return f"not offered by {framework.name}"


def job_key(name: str) -> str:
    """The job file's key of a field."""
    return {"devices": "cluster.devices", "global_batch": "train.global_batch"}.get(name, f"layout.{name}")


def job_value(value: Any) -> str:
    """A value as the job file writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest_by_ratio(value: int, candidates: Sequence[int]) -> int:
    """The candidate nearest to `value` by ratio; the smaller of two equally near."""
    return min(candidates, key=lambda c: (abs(math.log(c / max(value, 0.5))), c))
