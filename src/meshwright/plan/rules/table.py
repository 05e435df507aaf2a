"""The rules that a Layout must satisfy. A refusal says why, and the nearest change that satisfies the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshwright.divisors import divisors
from meshwright.layout import RECOMPUTE, Layout
from meshwright.plan.pipeline import TABLE
from meshwright.plan.rules.frameworks import DIMENSIONS
from meshwright.plan.rules.query import (
    FIELD_WORDS,
    LayoutQuery,
    Refusal,
    fills_pipeline,
    in_rounds,
    job_value,
    nearest_by_ratio,
    not_offered,
)


@dataclass(frozen=True)
class Rule:
    """One row of the table: `says` is the rule as a sentence; `check` returns a refusal if the layout breaks it."""

    name: str
    says: str
    check: Callable[[LayoutQuery], Refusal | None]


def refusals(query: LayoutQuery) -> tuple[Refusal, ...]:
    """The refusals of every rule that the layout breaks, in the table's order; empty when it can work."""
    return tuple(refusal for rule in RULES if (refusal := rule.check(query)) is not None)


def allowed(query: LayoutQuery) -> bool:
    """Whether no rule refuses the layout."""
    return all(rule.check(query) is None for rule in RULES)


def _positive(q: LayoutQuery) -> Refusal | None:
    names = ("dp", "shard", "tp", "pp", "vpp", "cp", "ep", "micro_batch")
    wrong = {name: 1 for name in names if getattr(q.layout, name) < 1}
    return Refusal("positive", f"{', '.join(wrong)} below 1", wrong, tuple(wrong)) if wrong else None


def _offered(name: str) -> Callable[[LayoutQuery], Refusal | None]:
    """A rule that `name` has its default where the framework does not offer it."""
    default = Layout.__dataclass_fields__[name].default

    def check(q: LayoutQuery) -> Refusal | None:
        value = getattr(q.layout, name)
        if value == default or (q.framework.offers.offload if name == "offload" else q.offers(name)):
            return None
        if not isinstance(value, bool) and value < 1:
            return None
        reason = f"{name}={job_value(value)}: {FIELD_WORDS[name]} is {not_offered(q.framework)}"
        return Refusal(f"offers_{name}", reason, {name: default}, (name,))

    return check


def _schedule(q: LayoutQuery) -> Refusal | None:
    offered, schedule = q.framework.offers.schedules, q.layout.schedule
    if schedule in offered or (schedule == "1f1b" and q.layout.pp <= 1):  # the default; unused without a pipeline
        return None
    choices = f"there are {', '.join(offered)}" if offered else "it has no pipeline"
    reason = f"schedule '{schedule}' is {not_offered(q.framework) if schedule in TABLE else 'unknown'}; {choices}"
    change: dict[str, Any] = {"schedule": "1f1b" if q.layout.pp <= 1 or "1f1b" in offered else (*offered, "1f1b")[0]}
    if not offered:
        change["pp"] = 1
    return Refusal("schedule", reason, change, ("schedule",))


def _virtual(q: LayoutQuery) -> Refusal | None:
    """vpp and the schedule must agree, and virtual stages need a pipeline."""
    layout, row = q.layout, TABLE.get(q.layout.schedule)
    if row is None or layout.vpp < 1 or layout.pp < 1 or (layout.vpp > 1 and not q.offers("vpp")):
        return None
    if layout.pp > 1 and layout.schedule not in q.framework.offers.schedules:
        return None
    if layout.pp == 1:
        if layout.vpp == 1:
            return None
        reason = f"vpp={layout.vpp} cuts each stage of a pipeline, and pp is 1"
        return Refusal("virtual_stages", reason, {"vpp": 1}, ("vpp", "pp"))
    if row.least_vpp <= layout.vpp <= row.most_vpp:
        return None
    wants = "needs vpp of 2 or more" if row.most_vpp > 2 else f"has vpp={row.most_vpp}"
    reason = f"schedule '{layout.schedule}' {wants}, not {layout.vpp}"
    change: dict[str, Any] = {"vpp": row.least_vpp}
    if layout.vpp > 1 and "interleaved" in q.framework.offers.schedules and row.most_vpp == 1:
        change = {"schedule": "interleaved"}
    return Refusal("virtual_stages", reason, change, ("vpp", "schedule"))


def _split_backward(q: LayoutQuery) -> Refusal | None:
    """torch's schedules that split the backward pass compute wrong gradients where each block is wrapped for data
    parallelism (measured with torch 2.13: losses differ from the first steps on, without an error)."""
    layout, needs = q.layout, TABLE.get(q.layout.schedule)
    if needs is None or not needs.splits or layout.pp <= 1 or not q.framework.torch_pipeline:
        return None
    if layout.dp * layout.cp <= 1:
        return None
    plain = "gpipe" if "gpipe" in q.framework.offers.schedules else "1f1b"
    reason = (
        f"schedule '{layout.schedule}' splits the backward pass, and torch's computes wrong gradients without an error "
        f"where blocks are sharded or replicated one by one (dp x cp = {layout.dp * layout.cp})"
    )
    return Refusal("split_backward", reason, {"schedule": plain, "vpp": 1}, ("schedule", "dp"))


def _recompute(q: LayoutQuery) -> Refusal | None:
    offered, recompute = q.recomputes, q.layout.recompute
    if recompute in offered:
        return None
    most = offered[-1] if offered else "none"
    if recompute not in RECOMPUTE:
        reason = f"recompute '{recompute}' is unknown; there are {', '.join(RECOMPUTE)}"
    elif recompute in q.framework.offers.recompute and q.facts.stateful_buffers:
        names = ", ".join(q.facts.stateful_buffers[:3])
        reason = f"recompute runs a block twice in a step, and with it would change buffers ({names}) twice"
    elif recompute in q.framework.offers.recompute:
        reason = f"selective recompute of {q.framework.name} drops attention alone, and this model has no attention"
    else:
        reason = f"recompute={recompute} is {not_offered(q.framework)}; there are {', '.join(offered)}"
    return Refusal("recompute", reason, {"recompute": most}, ("recompute",))


def _context(q: LayoutQuery) -> Refusal | None:
    layout, length = q.layout, q.facts.units_per_sample
    if layout.cp <= 1 or not q.offers("cp"):
        return None
    if not q.facts.has_attention:
        reason = f"cp={layout.cp} splits a sequence between devices, and this model has no attention"
        return Refusal("context", reason, {"cp": 1}, ("cp",))
    if length % (2 * layout.cp) == 0:
        return None
    near = nearest_by_ratio(layout.cp, q.facts.context_parallel_sizes(layout.cp))
    reason = f"cp={layout.cp} cuts a sequence into {2 * layout.cp} equal pieces, and it has {length} tokens"
    return Refusal("context", reason, {"cp": near}, ("cp",))


def _experts(q: LayoutQuery) -> Refusal | None:
    layout, data = q.layout, q.layout.dp * q.layout.cp
    if layout.ep <= 1 or not q.offers("ep") or data < 1:
        return None
    if not q.facts.experts:
        reason = f"ep={layout.ep} spreads experts over devices, and this model has none"
        return Refusal("experts", reason, {"ep": 1}, ("ep",))
    sizes = [d for d in q.facts.expert_parallel_sizes() if data % d == 0]
    if layout.ep in sizes:
        return None
    what = f"{q.facts.experts} experts" if data % layout.ep == 0 else f"dp x cp = {data}"
    reason = f"ep={layout.ep} does not divide {what}"
    return Refusal("experts", reason, {"ep": nearest_by_ratio(layout.ep, sizes)}, ("ep", "dp"))


def _sharded_experts(q: LayoutQuery) -> Refusal | None:
    """Some frameworks spread experts over the ranks that shard weights."""
    layout, data = q.layout, q.layout.dp * q.layout.cp
    if not q.framework.offers.experts_in_shard or layout.ep <= 1 or data < 1 or data % layout.ep or layout.shard < 1:
        return None
    if layout.shard % layout.ep == 0:
        return None
    context = layout.cp if q.framework.offers.shards_context else 1
    sizes = [d for d in divisors(data) if d % layout.ep == 0 and d % context == 0]
    reason = f"shard={layout.shard}: {q.framework.name} spreads ep={layout.ep} experts over ranks that shard weights"
    return Refusal("sharded_experts", reason, {"shard": nearest_by_ratio(layout.shard, sizes)}, ("shard", "ep"))


def _tensor_pipeline(q: LayoutQuery) -> Refusal | None:
    if q.framework.offers.tensor_in_pipeline or q.layout.tp <= 1 or q.layout.pp <= 1:
        return None
    reason = f"tp={q.layout.tp} in a pipeline is {not_offered(q.framework)}"
    return Refusal("tensor_pipeline", reason, {"tp": 1}, ("tp", "pp"))


def _devices(q: LayoutQuery) -> Refusal | None:
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


def _nearest_degrees(q: LayoutQuery) -> dict[str, int]:
    """The degrees with the right product that the model can be split by: fewest changed, then nearest."""
    layout, offers = q.layout, q.offers
    best: tuple[float, ...] | None = None
    contexts = q.facts.context_parallel_sizes(q.devices) if offers("cp") else [1]
    tensors = q.facts.tensor_parallel_sizes(q.devices, q.framework) if offers("tp") else [1]
    for tp in (t for t in tensors if q.devices % t == 0):
        for pp in (p for p in divisors(q.devices // tp) if p <= q.facts.stages and (p == 1 or offers("pp"))):
            for cp in (c for c in contexts if q.devices // tp // pp % c == 0):
                new = (q.devices // tp // pp // cp, tp, pp, cp)
                old = (layout.dp, layout.tp, layout.pp, layout.cp)
                far = sum(abs(math.log(a / b)) for a, b in zip(new, old, strict=True))
                key = (sum(a != b for a, b in zip(new, old, strict=True)), far, *new)
                best = key if best is None or key < best else best
    assert best is not None  # dp = devices is always a candidate
    names = ("dp", "tp", "pp", "cp")
    return {n: int(v) for n, v in zip(names, best[2:], strict=True) if int(v) != getattr(layout, n)}


def _shard(q: LayoutQuery) -> Refusal | None:
    layout, data = q.layout, q.layout.dp * q.layout.cp
    if layout.shard < 1 or data < 1:
        return None
    context = layout.cp if q.framework.offers.shards_context and layout.cp > 1 else 1
    if data % layout.shard == 0 and layout.shard % context == 0:
        return None
    near = nearest_by_ratio(layout.shard, [d for d in divisors(data) if d % context == 0])
    reason = f"shard={layout.shard} does not divide dp x cp = {data}"
    if data % layout.shard == 0:
        reason = f"shard={layout.shard}: {q.framework.name} shards weights over all cp={layout.cp} ranks at least"
    return Refusal("shard", reason, {"shard": near}, ("shard", "dp"))


def _weights(q: LayoutQuery) -> Refusal | None:
    """Some frameworks shard weights only over all data-parallel ranks and without a pipeline (`spreads_optimizer`)."""
    layout, data = q.layout, q.layout.dp * q.layout.cp
    if not q.framework.offers.spreads_optimizer or layout.shard <= 1 or data < 1 or data % layout.shard:
        return None
    if layout.pp <= 1 and layout.shard == data:
        return None
    where = "in a pipeline" if layout.pp > 1 else f"over part of dp x cp = {data}"
    reason = f"shard={layout.shard}: {q.framework.name} cannot shard weights {where}; it shards its optimizer anyway"
    return Refusal("weights", reason, {"shard": 1}, ("shard", "pp"))


def _tensor(q: LayoutQuery) -> Refusal | None:
    tp = q.layout.tp
    if tp <= 1:
        return None
    if "tp" not in q.facts.splittable:
        reason = f"tp={tp}: this model has no table of logical axes to split its parameters by; add one for tp"
        return Refusal("tp", reason, {"tp": 1}, ("tp",))
    wrong = [f"{axis}={size}" for axis, size in sorted(q.facts.sizes_to_divide(q.framework).items()) if size % tp]
    if not wrong:
        return None
    near = nearest_by_ratio(tp, q.facts.tensor_parallel_sizes(tp, q.framework))
    return Refusal("tp", f"tp={tp} does not divide {', '.join(wrong)}", {"tp": near}, ("tp",))


def _sequence(q: LayoutQuery) -> Refusal | None:
    layout, seq_len = q.layout, q.facts.units_per_sample
    if not layout.sequence_parallel:
        return _without_sequence(q)
    off: dict[str, Any] = {"sequence_parallel": False}
    if "tp" not in q.facts.splittable:
        reason = "sequence_parallel splits over tp, and this model has no table of logical axes for tp"
        return Refusal("sequence_parallel", reason, off, ("sequence_parallel",))
    if layout.tp <= 1:
        reason = "sequence_parallel splits over tp, and tp is 1"
        return Refusal("sequence_parallel", reason, off, ("sequence_parallel", "tp"))
    if seq_len % (layout.tp * max(1, layout.cp)):
        ways = f"tp={layout.tp}" if layout.cp <= 1 else f"tp x cp = {layout.tp * layout.cp}"
        reason = f"sequence_parallel: {ways} does not divide the sequence length {seq_len}"
        change = {**off, "tp": 1} if _needs_sequence(q) else off
        return Refusal("sequence_parallel", reason, change, ("sequence_parallel", "tp"))
    return None


def _needs_sequence(q: LayoutQuery) -> bool:
    """Whether the framework has this tensor parallelism only with sequence parallelism."""
    offers = q.framework.offers
    return offers.sequence_always or (offers.sequence_with_experts and q.layout.ep > 1 and q.facts.experts > 0)


def _without_sequence(q: LayoutQuery) -> Refusal | None:
    layout, offers = q.layout, q.framework.offers
    if layout.tp <= 1 or "tp" not in q.facts.splittable or not _needs_sequence(q):
        return None
    able = q.facts.units_per_sample % (layout.tp * max(1, layout.cp)) == 0
    where = " beside experts that are spread" if not offers.sequence_always else ""
    reason = f"{q.framework.name} has tensor parallelism only with sequence parallelism{where}"
    change: dict[str, Any] = {"sequence_parallel": True} if able else {"tp": 1}
    return Refusal("sequence_parallel", reason, change, ("sequence_parallel", "tp"))


def _pipeline(q: LayoutQuery) -> Refusal | None:
    pp, blocks = q.layout.pp, q.facts.blocks
    if pp <= 1:
        return None
    if "pp" not in q.facts.splittable:
        reason = f"pp={pp}: this model does not name its blocks; give it an ordered nn.ModuleDict `blocks`"
        return Refusal("pp", reason, {"pp": 1}, ("pp",))
    if q.facts.ties_between_blocks:
        tied = " and ".join(q.facts.ties_between_blocks[0])
        reason = f"pp={pp}: {tied} are one tensor; in a pipeline only the first and the last block can share one"
        return Refusal("pp", reason, {"pp": 1}, ("pp",))
    if pp > blocks:
        reason = f"pp={pp} stages, and the model has {blocks} blocks to cut between"
        return Refusal("pp", reason, {"pp": blocks, **({"vpp": 1} if q.layout.vpp > 1 else {})}, ("pp",))
    if pp * q.layout.vpp > blocks:
        reason = f"pp={pp} x vpp={q.layout.vpp} stages, and the model has {blocks} blocks to cut between"
        return Refusal("pp", reason, {"vpp": max(1, blocks // pp)}, ("pp", "vpp"))
    return None


def _batch(q: LayoutQuery) -> Refusal | None:
    dp, micro, batch = q.layout.dp, q.layout.micro_batch, q.global_batch
    if dp < 1 or micro < 1:
        return None
    if batch < 1:
        return Refusal("global_batch", f"global_batch is {batch}", {"global_batch": dp * micro}, ("global_batch",))
    if batch % (dp * micro) == 0:
        return None
    if batch % dp == 0:
        change = {"micro_batch": nearest_by_ratio(micro, divisors(batch // dp))}
    else:
        change = {"global_batch": max(1, round(batch / (dp * micro))) * dp * micro}
    reason = f"global_batch={batch} is not a multiple of dp x micro_batch = {dp} x {micro}"
    return Refusal("global_batch", reason, change, ("global_batch", "dp", "micro_batch"))


def _micro_batches(q: LayoutQuery) -> Refusal | None:
    """A schedule needs a micro-batch or more per stage; an interleaved one, whole rounds of micro-batches."""
    layout, count = q.layout, q.micro_batches
    if layout.pp <= 1 or not count or layout.schedule not in TABLE or fills_pipeline(layout, count, q.framework):
        return None
    share = q.global_batch // layout.dp
    counts = [share // micro for micro in divisors(share)]
    good = [n for n in counts if fills_pipeline(layout, n, q.framework)]
    if good:
        change: dict[str, Any] = {"micro_batch": share // nearest_by_ratio(count, good)}
    elif "gpipe" in q.framework.offers.schedules:
        change = {"schedule": "gpipe", "vpp": 1}
    elif "1f1b" in q.framework.offers.schedules and not q.framework.torch_pipeline:
        change = {"schedule": "1f1b", "vpp": 1}
    else:
        change = {"pp": 1, "vpp": 1}
    change = {name: value for name, value in change.items() if getattr(layout, name) != value}
    whole_rounds = in_rounds(layout) and count >= layout.pp
    needs = f"a multiple of {layout.pp}" if whole_rounds else TABLE[layout.schedule].fill * layout.pp
    reason = f"{layout.schedule} over pp={layout.pp} stages needs {needs} micro-batches, and a step has {count}"
    return Refusal("micro_batches", reason, change, ("schedule", "pp", "micro_batch"))


def _buffers(q: LayoutQuery) -> Refusal | None:
    """Layouts that split the batch would give each part its own statistics, unlike one device that sees it at once."""
    if not q.facts.stateful_buffers:
        return None
    layout, names = q.layout, ", ".join(q.facts.stateful_buffers[:3])
    change: dict[str, Any] = {"sequence_parallel": False} if layout.sequence_parallel else {}
    if layout.dp > 1 or layout.cp > 1:
        change |= {"devices": max(1, layout.tp * layout.pp), "dp": 1, "shard": 1}
        change |= {"cp": 1} if layout.cp > 1 else {}
    if 1 <= layout.micro_batch < q.global_batch:
        change |= {"micro_batch": q.global_batch, **({"schedule": "gpipe"} if layout.pp > 1 else {})}
    if not change:
        return None
    reason = (
        f"buffers that training changes ({names}) would differ between parts of a batch; use LayerNorm or GroupNorm"
    )
    return Refusal("stateful_buffers", reason, change, ("dp", "cp", "micro_batch", "sequence_parallel"))


RULES: tuple[Rule, ...] = (
    Rule("positive", "every degree is 1 or more", _positive),
    *(
        Rule(f"offers_{name}", f"{FIELD_WORDS[name]}: where the framework offers it", _offered(name))
        for name in DIMENSIONS
    ),
    Rule("offers_offload", "optimizer state in host memory: where the framework offers it", _offered("offload")),
    Rule("schedule", "a schedule that the framework offers", _schedule),
    Rule(
        "recompute",
        "recompute as the framework offers it; selective that drops attention alone needs some",
        _recompute,
    ),
    Rule("devices", "dp x tp x pp x cp is the number of devices", _devices),
    Rule("shard", "shard divides dp x cp, and spans cp where the framework needs it", _shard),
    Rule("weights", "shard is 1 or dp x cp, and 1 in a pipeline, where the framework needs it", _weights),
    Rule("tp", "tp divides heads, kv_heads, ffn, and a vocab that is not padded, and needs axes", _tensor),
    Rule("sequence_parallel", "needs tp > 1 and tp x cp that divides the sequence; some tp needs it", _sequence),
    Rule("context", "2 x cp divides the sequence, and the model has attention", _context),
    Rule("experts", "ep divides the experts and dp x cp", _experts),
    Rule("sharded_experts", "shard is a multiple of ep, where the framework needs it", _sharded_experts),
    Rule("tensor_pipeline", "tp in a pipeline: where the framework offers it", _tensor_pipeline),
    Rule("pp", "a stage has a block or more, the model names its blocks, and ties join its ends alone", _pipeline),
    Rule("virtual_stages", "vpp > 1 needs a pipeline and a schedule of virtual stages", _virtual),
    Rule("split_backward", "no split backward pass over wrapped blocks in torch's pipeline", _split_backward),
    Rule("global_batch", "global_batch is a multiple of dp x micro_batch", _batch),
    Rule("micro_batches", "the schedule has as many micro-batches as it needs", _micro_batches),
    Rule("stateful_buffers", "buffers that training changes need the whole batch in one place", _buffers),
)
