"""What a Layout may not be: one table of rules, each with its reason and the nearest change that satisfies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from meshwright.card import Card
from meshwright.layout import AXIS_RULES, RECOMPUTE, SCHEDULES, Layout


@dataclass(frozen=True)
class Facts:
    """What the rules need to know of a model. `split_sizes`: axis that tensor parallelism splits -> the greatest
    divisor that all its sizes share."""

    blocks: int
    units_per_sample: int
    has_attention: bool
    splittable: frozenset[str]
    split_sizes: Mapping[str, int]
    stateful_buffers: tuple[str, ...]

    @staticmethod
    def of(card: Card) -> Facts:
        sizes = {axis: math.gcd(*sizes) for axis, sizes in card.axis_sizes().items() if AXIS_RULES.get(axis) == "tp"}
        return Facts(
            blocks=len(card.blocks),
            units_per_sample=card.units_per_sample,
            has_attention=any(block.attention for block in card.blocks),
            splittable=card.splittable,
            split_sizes=sizes,
            stateful_buffers=card.stateful_buffers,
        )

    @property
    def stages(self) -> int:
        """The most pipeline stages that it can be cut into."""
        return self.blocks if "pp" in self.splittable else 1

    def tensor_parallel_sizes(self, limit: int) -> list[int]:
        """Every tp up to `limit` that divides each axis that tensor parallelism splits; [1] without a table."""
        if "tp" not in self.splittable:
            return [1]
        common = math.gcd(*self.split_sizes.values()) if self.split_sizes else 1
        return [d for d in divisors(common) if d <= limit]


@dataclass(frozen=True)
class Question:
    """A layout asked about: for this model, on so many devices, with so many samples a step."""

    layout: Layout
    facts: Facts
    devices: int
    global_batch: int

    def changed(self, change: Mapping[str, Any]) -> Question:
        """The same question with `change` applied: fields of the Layout, `devices` or `global_batch`."""
        inner = {key: value for key, value in change.items() if key not in ("devices", "global_batch")}
        return Question(
            replace(self.layout, **inner),
            self.facts,
            change.get("devices", self.devices),
            change.get("global_batch", self.global_batch),
        )


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot work; `change` is the nearest that satisfies this rule, `fields` what it is about."""

    rule: str
    reason: str
    change: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[str, ...] = ()

    @property
    def nearest(self) -> str:
        """The change in words of the job file: "layout.tp=2 layout.dp=1"."""
        return "nearest: " + " ".join(f"{key_of(name)}={word(value)}" for name, value in self.change.items())


@dataclass(frozen=True)
class Rule:
    """One row of the table: `says` is the rule as a sentence, `check` finds what breaks it."""

    name: str
    says: str
    check: Callable[[Question], Refusal | None]


def refusals(question: Question) -> tuple[Refusal, ...]:
    """Every rule that the layout breaks, in the table's order; empty when it can work."""
    return tuple(found for rule in RULES if (found := rule.check(question)) is not None)


def allowed(question: Question) -> bool:
    """Whether no rule refuses the layout."""
    return all(rule.check(question) is None for rule in RULES)


def key_of(name: str) -> str:
    """Where a field stands in the job file."""
    return {"devices": "cluster.devices", "global_batch": "train.global_batch"}.get(name, f"layout.{name}")


def word(value: Any) -> str:
    """A value as the job file writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(number: int) -> list[int]:
    """Divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_of(value: int, candidates: list[int]) -> int:
    """The candidate nearest to `value` by ratio; the smaller of two equally near."""
    return min(candidates, key=lambda c: (abs(math.log(c / max(value, 0.5))), c))


def _positive(q: Question) -> Refusal | None:
    names = ("dp", "shard", "tp", "pp", "vpp", "cp", "ep", "micro_batch")
    wrong = {name: 1 for name in names if getattr(q.layout, name) < 1}
    return Refusal("positive", f"{', '.join(wrong)} below 1", wrong, tuple(wrong)) if wrong else None


def _offered(name: str, value: Any, reason: str) -> Callable[[Question], Refusal | None]:
    """A rule that holds `name` at `value`, the only one offered so far."""

    def check(q: Question) -> Refusal | None:
        asked = getattr(q.layout, name)
        if asked == value or (isinstance(asked, int) and asked < 1 and not isinstance(asked, bool)):
            return None
        return Refusal(name, f"{name}={word(asked)}: {reason} is not offered yet", {name: value}, (name,))

    return check


def _schedule(q: Question) -> Refusal | None:
    if q.layout.schedule in SCHEDULES:
        return None
    reason = f"schedule '{q.layout.schedule}' is not offered yet; there are {', '.join(SCHEDULES)}"
    return Refusal("schedule", reason, {"schedule": "1f1b"}, ("schedule",))


def _recompute(q: Question) -> Refusal | None:
    if q.layout.recompute not in RECOMPUTE:
        reason = f"recompute '{q.layout.recompute}' is unknown; there are {', '.join(RECOMPUTE)}"
        return Refusal("recompute", reason, {"recompute": "full"}, ("recompute",))
    if q.layout.recompute == "selective" and not q.facts.has_attention:
        reason = "selective recompute drops what attention keeps, and this model has no attention"
        return Refusal("recompute", reason, {"recompute": "full"}, ("recompute",))
    return None


def _devices(q: Question) -> Refusal | None:
    layout = q.layout
    if layout.devices == q.devices or min(layout.dp, layout.tp, layout.pp, layout.cp) < 1:
        return None
    reason = f"dp{layout.dp} x tp{layout.tp} x pp{layout.pp} x cp{layout.cp} is {layout.devices}, not {q.devices}"
    rest = layout.tp * layout.pp * layout.cp
    if q.devices % rest == 0:
        change: dict[str, int] = {"dp": q.devices // rest}
    else:
        change = _nearest_degrees(q)
    return Refusal("devices", f"{reason} devices", change, ("dp", "tp", "pp", "cp"))


def _nearest_degrees(q: Question) -> dict[str, int]:
    """Degrees with the right product: fewest changed, then nearest, among those that the model can be split by."""
    layout = q.layout
    best: tuple[float, ...] | None = None
    for tp in (t for t in q.facts.tensor_parallel_sizes(q.devices) if q.devices % t == 0):
        for pp in (p for p in divisors(q.devices // tp) if p <= q.facts.stages):
            new = (q.devices // tp // pp, tp, pp, 1)
            old = (layout.dp, layout.tp, layout.pp, layout.cp)
            far = sum(abs(math.log(a / b)) for a, b in zip(new, old, strict=True))
            key = (sum(a != b for a, b in zip(new, old, strict=True)), far, *new)
            best = key if best is None or key < best else best
    assert best is not None  # dp = devices is always a candidate
    names = ("dp", "tp", "pp", "cp")
    return {n: int(v) for n, v in zip(names, best[2:], strict=True) if int(v) != getattr(layout, n)}


def _shard(q: Question) -> Refusal | None:
    layout, data = q.layout, q.layout.dp * q.layout.cp
    if layout.shard < 1 or data < 1 or data % layout.shard == 0:
        return None
    near = nearest_of(layout.shard, divisors(data))
    return Refusal("shard", f"shard={layout.shard} does not divide dp x cp = {data}", {"shard": near}, ("shard", "dp"))


def _tensor(q: Question) -> Refusal | None:
    tp = q.layout.tp
    if tp <= 1:
        return None
    if "tp" not in q.facts.splittable:
        reason = f"tp={tp}: this model has no table of logical axes to split its parameters by; add one for tp"
        return Refusal("tp", reason, {"tp": 1}, ("tp",))
    wrong = [f"{axis}={size}" for axis, size in sorted(q.facts.split_sizes.items()) if size % tp]
    if not wrong:
        return None
    near = nearest_of(tp, q.facts.tensor_parallel_sizes(tp))
    return Refusal("tp", f"tp={tp} does not divide {', '.join(wrong)}", {"tp": near}, ("tp",))


def _sequence(q: Question) -> Refusal | None:
    layout, seq_len = q.layout, q.facts.units_per_sample
    if not layout.sequence_parallel:
        return None
    off = {"sequence_parallel": False}
    if "tp" not in q.facts.splittable:
        reason = "sequence_parallel splits over tp, and this model has no table of logical axes for tp"
        return Refusal("sequence_parallel", reason, off, ("sequence_parallel",))
    if layout.tp <= 1:
        reason = "sequence_parallel splits over tp, and tp is 1"
        return Refusal("sequence_parallel", reason, off, ("sequence_parallel", "tp"))
    if seq_len % layout.tp:
        reason = f"sequence_parallel: tp={layout.tp} does not divide the sequence length {seq_len}"
        return Refusal("sequence_parallel", reason, off, ("sequence_parallel", "tp"))
    return None


def _pipeline(q: Question) -> Refusal | None:
    pp, blocks = q.layout.pp, q.facts.blocks
    if pp <= 1:
        return None
    if "pp" not in q.facts.splittable:
        reason = f"pp={pp}: this model does not name its blocks; give it an ordered nn.ModuleDict `blocks`"
        return Refusal("pp", reason, {"pp": 1}, ("pp",))
    if pp > blocks:
        reason = f"pp={pp} stages, and the model has {blocks} blocks to cut between"
        return Refusal("pp", reason, {"pp": blocks}, ("pp",))
    return None


def _batch(q: Question) -> Refusal | None:
    dp, micro, batch = q.layout.dp, q.layout.micro_batch, q.global_batch
    if dp < 1 or micro < 1:
        return None
    if batch < 1:
        return Refusal("global_batch", f"global_batch is {batch}", {"global_batch": dp * micro}, ("global_batch",))
    if batch % (dp * micro) == 0:
        return None
    if batch % dp == 0:
        change = {"micro_batch": nearest_of(micro, divisors(batch // dp))}
    else:
        change = {"global_batch": max(1, round(batch / (dp * micro))) * dp * micro}
    reason = f"global_batch={batch} is not a multiple of dp x micro_batch = {dp} x {micro}"
    return Refusal("global_batch", reason, change, ("global_batch", "dp", "micro_batch"))


def _warm_up(q: Question) -> Refusal | None:
    """1F1B starts with a micro-batch on each stage; torch's schedule refuses to run with fewer."""
    layout, batch = q.layout, q.global_batch
    per_step = layout.dp * layout.micro_batch
    if layout.schedule != "1f1b" or layout.pp <= 1 or min(layout.dp, layout.micro_batch, batch) < 1 or batch % per_step:
        return None
    count, share = batch // per_step, batch // layout.dp
    if count >= layout.pp:
        return None
    change: dict[str, Any] = {"schedule": "gpipe"}
    if share >= layout.pp:
        change = {"micro_batch": most_in_flight(share, layout.pp)}
    reason = f"1f1b over pp={layout.pp} stages needs as many micro-batches, and a step has {count}"
    return Refusal("micro_batches", reason, change, ("schedule", "pp", "micro_batch"))


def most_in_flight(share: int, stages: int) -> int:
    """The largest micro-batch that divides a rank's share of the batch into `stages` parts or more."""
    return max(d for d in divisors(share) if d <= share // stages)


def _buffers(q: Question) -> Refusal | None:
    """Statistics of a batch would be of a part of it; no layout that parts the batch computes what one device does."""
    if not q.facts.stateful_buffers:
        return None
    layout, names = q.layout, ", ".join(q.facts.stateful_buffers[:3])
    if layout.dp > 1:
        change: dict[str, Any] = {"devices": max(1, layout.tp * layout.pp * layout.cp), "dp": 1, "shard": 1}
        if layout.pp > 1:
            change |= {"micro_batch": q.global_batch, "schedule": "gpipe"}
    elif layout.pp > 1 and layout.micro_batch >= 1 and q.global_batch > layout.micro_batch:
        change = {"micro_batch": q.global_batch, "schedule": "gpipe"}
    else:
        return None
    reason = (
        f"buffers that training changes ({names}) would differ between parts of a batch; use LayerNorm or GroupNorm"
    )
    return Refusal("stateful_buffers", reason, change, ("dp", "micro_batch"))


RULES: tuple[Rule, ...] = (
    Rule("positive", "every degree is 1 or more", _positive),
    Rule("cp", "context parallel is not offered yet", _offered("cp", 1, "context parallel")),
    Rule("ep", "expert parallel is not offered yet", _offered("ep", 1, "expert parallel")),
    Rule("vpp", "virtual stages are not offered yet", _offered("vpp", 1, "an interleaved pipeline")),
    Rule("offload", "offload is not offered yet", _offered("offload", False, "optimizer state in host memory")),
    Rule("schedule", "schedules: gpipe, 1f1b", _schedule),
    Rule("recompute", "recompute: none, selective (with attention), full", _recompute),
    Rule("devices", "dp x tp x pp x cp is the number of devices", _devices),
    Rule("shard", "shard divides dp x cp", _shard),
    Rule("tp", "tp divides heads, kv_heads, ffn and vocab, and needs a table of axes", _tensor),
    Rule("sequence_parallel", "sequence_parallel needs tp > 1 that divides the sequence", _sequence),
    Rule("pp", "a stage has a block or more, and the model names its blocks", _pipeline),
    Rule("global_batch", "global_batch is a multiple of dp x micro_batch", _batch),
    Rule("micro_batches", "1f1b has a micro-batch for each stage or more", _warm_up),
    Rule("stateful_buffers", "buffers that training changes need the whole batch in one place", _buffers),
)
