"""The strategies that suit a job, and where to keep its data: a table of rules, each with its reason in words.

A rule sees the facts of the job (Situation), the tool that suits best and its planned layout, and the other tools,
which may offer what that one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.cluster import Cluster
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.layout import Layout
from meshwright.plan.rules import FRAMEWORKS

EXPERIENCE = ("new", "some", "expert")
#: Bytes per parameter of mixed-precision AdamW: fp32 master and two moments, a gradient, a copy to compute with.
TRAINING_BYTES = 16
#: Of these, master and moments, which a distributed optimizer spreads.
OPTIMIZER_BYTES = 12
#: The share of a device's memory for weights, gradients and optimizer; the rest is for activations.
STATE_SHARE = 0.8
#: Bytes per second that each node may read from shared storage: a link of one gigabit.
SHARED_STORAGE = 100e6


@dataclass(frozen=True)
class DataVolume:
    """The data that a run reads. `source` has `size_bytes`, None where unknown. A unit (a token, a sample) takes
    `source_bytes_per_unit` there and `stored_bytes_per_unit` once indexed, 0 where unknown."""

    source: str
    unit: str
    units_per_step: int
    steps: int
    size_bytes: int | None = None
    source_bytes_per_unit: float = 0.0
    stored_bytes_per_unit: float = 0.0

    @property
    def passes(self) -> float | None:
        """The number of passes of the run over its source; None where unknown."""
        if not self.size_bytes or not self.source_bytes_per_unit:
            return None
        return self.steps * self.units_per_step * self.source_bytes_per_unit / self.size_bytes


@dataclass(frozen=True)
class Situation:
    """The facts of a job that the advice depends on, beside its plans. `experience` is one of EXPERIENCE. `margin` is
    the ratio of two layouts' predicted times below which they cannot be told apart. `untrained` is empty where `train`
    can train this model, else says what it can. Raises InputError for an unknown experience."""

    cluster: Cluster
    parameters: int
    language_model: bool
    built_in: bool  # a family of ours, or a folder of one
    experts: bool
    reading: DataVolume
    experience: str
    margin: float
    untrained: str = ""
    pinned: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.experience not in EXPERIENCE:
            what = f"experience '{self.experience}' is not known"
            raise InputError(Problem("advice", what, nearest_name(self.experience, EXPERIENCE)))

    @property
    def kind(self) -> str:
        """The kind of device for tools: "cpu", "cuda" (AMD's too), "tpu", "gaudi" or "trainium"."""
        device = self.cluster.device
        return device.generation if device.generation in ("tpu", "gaudi", "trainium") else device.kind

    @property
    def state_bytes(self) -> int:
        return self.parameters * TRAINING_BYTES

    @property
    def fits_one_device(self) -> bool:
        return self.state_bytes < STATE_SHARE * self.cluster.device.memory_bytes


@dataclass(frozen=True)
class FrameworkPlan:
    """The best layout under a framework, and the seconds of its step."""

    framework: str
    step_seconds: float
    layout: Layout

    @property
    def spreads(self) -> bool:
        """Whether ranks with whole weights spread the optimizer's state."""
        layout, row = self.layout, FRAMEWORKS[self.framework].planned
        return row.optimizer_shard == "dp" and layout.shard == 1 and layout.dp * layout.cp > 1


@dataclass(frozen=True)
class Candidate:
    """A tool of the table: the fields of the Layout that it splits by, whether it suits, and its plan if it has one."""

    name: str
    splits: frozenset[str]
    suits: bool
    best_plan: FrameworkPlan | None


@dataclass(frozen=True)
class RuleContext:
    """The input of a rule. `plan` is of `tool`, the best tool with a plan that `suits`, or the nearest where none does.
    `others` are the other tools of the table."""

    situation: Situation
    tool: str
    splits: frozenset[str]
    suits: bool
    plan: FrameworkPlan
    others: tuple[Candidate, ...]

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    def other_plans(self, name: str) -> list[tuple[Candidate, FrameworkPlan]]:
        """Other tools whose plans split by this field of the Layout, the quickest first."""
        plans = [(one, one.best_plan) for one in self.others if one.best_plan]
        spreading = (pair for pair in plans if getattr(pair[1].layout, name) > 1)
        return sorted(spreading, key=lambda pair: pair[1].step_seconds)

    def link(self, extent: int) -> str:
        """The slowest link of a group within `extent` adjacent ranks, in words."""
        cluster = self.situation.cluster
        link = cluster.link(extent)
        if link is cluster.intra and extent <= cluster.domain:
            return f"{link.name} ({size(link.bytes_per_second)}/s a device)"
        name = f"{link.name}, " if link != cluster.intra else ""
        return f"the network ({name}{size(link.bytes_per_second)}/s a device)"


def size(amount: float) -> str:
    """Bytes in three digits: 128 GB."""
    for bytes_, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= bytes_:
            return f"{amount / bytes_:.3g} {unit}"
    return f"{amount:.3g} B"


def number(amount: float) -> str:
    """A number in words: 2.1 billion."""
    for count, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if amount >= count:
            return f"{amount / count:.3g} {word}"
    return f"{amount:,.0f}" if amount >= 10 else f"{amount:.2g}"


def seconds(amount: float) -> str:
    return f"{amount:.3g} s" if amount < 1000 else f"{amount:,.0f} s"


def _one_device(ctx: RuleContext) -> str:
    job = ctx.situation
    if job.cluster.devices > 1:
        return ""
    memory = job.cluster.device.memory_bytes
    state = f"there is one device, and weights, gradients and optimizer of {size(job.state_bytes)}"
    if job.fits_one_device:
        return f"{state} fit its {size(memory)}"
    fit = "barely leave room in" if job.state_bytes < memory else "are more than"
    return f"{state} {fit} its {size(memory)}: it works as {ctx.layout}"


def _replicated(ctx: RuleContext) -> str:
    job, layout = ctx.situation, ctx.layout
    copies = layout.dp * layout.cp
    if copies == 1 or layout.shard > 1 or (ctx.plan.spreads and not job.fits_one_device):
        return ""
    if layout.tp * layout.pp > 1:
        return f"{copies} copies, each split over {layout.tp * layout.pp} devices, only meet to add up gradients"
    return (
        f"weights, gradients and optimizer of {size(job.state_bytes)} fit every device: copies that only meet to add "
        "up gradients move the least"
    )


def _spread(ctx: RuleContext) -> str:
    job, copies = ctx.situation, ctx.layout.dp * ctx.layout.cp
    if not ctx.plan.spreads or job.fits_one_device:
        return ""
    return (
        f"{size(job.state_bytes)} of weights, gradients and optimizer against {size(job.cluster.device.memory_bytes)} "
        f"a device: each data-parallel rank keeps its weights whole, and the optimizer's part, "
        f"{size(job.parameters * OPTIMIZER_BYTES)}, is spread over the {copies} of them"
    )


def _sharded(ctx: RuleContext) -> str:
    job, layout = ctx.situation, ctx.layout
    if layout.shard == 1:
        return ""
    parts = layout.shard * layout.tp * layout.pp
    first = " and ".join(name for name in ("tp", "pp") if getattr(layout, name) > 1)
    over = f"sharded over {layout.shard} devices" + (f", on top of the split by {first}" if first else "")
    state_bytes = job.parameters * (TRAINING_BYTES - OPTIMIZER_BYTES * layout.offload)
    each = f"{size(state_bytes / parts)} each" + " without the optimizer" * layout.offload
    return (
        f"{size(job.state_bytes)} of weights, gradients and optimizer against {size(job.cluster.device.memory_bytes)} "
        f"a device: {over}, it is {each}, for gathering the weights anew to compute with"
    )


def _tensor(ctx: RuleContext) -> str:
    cluster, tp = ctx.situation.cluster, ctx.layout.tp
    if tp == 1:
        return ""
    if tp > cluster.domain:
        return f"every layer waits for it, and over {tp} devices it has to cross {ctx.link(tp)}"
    words = f"every layer waits for it, so it stays inside a node, on {ctx.link(tp)}"
    if cluster.devices > cluster.domain:
        times = cluster.intra.bytes_per_second / cluster.inter.bytes_per_second
        words += f", {times:.0f} times the network's speed" if times > 1 else ""
    return words


def _pipeline(ctx: RuleContext) -> str:
    if ctx.layout.pp == 1:
        return ""
    return (
        f"{ctx.layout.pp} stages hand on one activation where sharding would move the weights, here over "
        f"{ctx.link(ctx.layout.devices)}; many micro-batches keep the bubble small"
    )


def _context(ctx: RuleContext) -> str:
    layout = ctx.layout
    if layout.cp > 1:
        return (
            f"each sequence is split over {layout.cp} devices, which leaves each its part of the activations; keys and "
            f"values are passed on over {ctx.link(layout.cp * layout.tp)}"
        )
    quickest = next(iter(ctx.other_plans("cp")), None)
    if quickest is None or quickest[1].step_seconds * ctx.situation.margin > ctx.plan.step_seconds:
        return ""
    without = f"the best layout of {ctx.tool} does without" if "cp" in ctx.splits else f"{ctx.tool} does not offer it"
    return f"{without}; {_other_words(ctx, *quickest, 'cp', 'splits each sequence')}"


def _experts(ctx: RuleContext) -> str:
    if not ctx.situation.experts:
        return ""
    layout = ctx.layout
    if layout.ep > 1:
        return (
            f"the experts of a layer are spread over {layout.ep} devices, and tokens travel to them over "
            f"{ctx.link(layout.ep * layout.tp)}"
        )
    together = "the experts of a layer stay together: "
    if ctx.situation.cluster.devices == 1:
        return together + "there is one device"
    if "ep" in ctx.situation.pinned:
        return together + "the job pins ep=1"
    spread = [_other_words(ctx, other, plan, "ep", "spreads them") for other, plan in ctx.other_plans("ep")]
    if "ep" in ctx.splits:
        return "; ".join([f"{together}no layout of {ctx.tool} that spreads them is quicker here and fits", *spread])
    able = [other for other in ctx.others if "ep" in other.splits]
    if planned := [other.name for other in able if other.best_plan]:
        rest = f"{_join(planned)} can, and the best layout of {'each' if len(planned) > 1 else 'it'} does without"
    elif suiting := [other.name for other in able if other.suits]:
        rest = f"{_join(suiting)} can"
    else:
        rest = f"of the tools that do ({_join([other.name for other in able])}) none suits here"
    return "; ".join([f"{together}{ctx.tool} does not spread them", *(spread or [rest])])


def _other_words(ctx: RuleContext, other: Candidate, plan: FrameworkPlan, name: str, does: str) -> str:
    """How another tool's plan splits by a field of the Layout, and the seconds of its step."""
    fit = "" if other.suits else ", which does not suit here,"
    times = f"{seconds(plan.step_seconds)} a step against {seconds(ctx.plan.step_seconds)}"
    return f"{other.name}{fit} {does} over {getattr(plan.layout, name)} devices, for {times}"


def _memory(ctx: RuleContext) -> str:
    layout = ctx.layout
    words = []
    if layout.recompute != "none":
        some = "all" if layout.recompute == "full" else "some"
        words.append(f"{some} activations of a block are computed again in its backward pass, not kept")
    if layout.offload:
        words.append(f"the optimizer's {size(ctx.situation.parameters * OPTIMIZER_BYTES)} stay in the hosts' memory")
    return ", and ".join(words) + "; without that it does not fit, or takes longer" if words else ""


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _data(ctx: RuleContext) -> str:
    reading, nodes = ctx.situation.reading, ctx.situation.cluster.nodes
    each_second = reading.units_per_step / ctx.plan.step_seconds
    # the ranks of a data-parallel copy read the same samples, and a copy may span several nodes
    rate = each_second * reading.stored_bytes_per_unit / min(nodes, ctx.layout.dp)
    words = f"a run reads {number(reading.steps * reading.units_per_step)} {reading.unit}{_passes(reading)}, "
    words += f"{number(each_second)} a second"
    words += f" or {size(rate)}/s{' a node' * (nodes > 1)}" if rate else ""
    if nodes == 1:
        where = "keep the data on the machine that trains"
    elif not rate:
        where = "put a copy near each node, or on storage that is fast enough for all"
    elif rate <= SHARED_STORAGE:
        where = f"storage that the {nodes} nodes share is enough"
    else:
        where = f"put a copy near each of {nodes} nodes: it is more than the {size(SHARED_STORAGE)}/s of a gigabit link"
    if ctx.suits and ctx.plan.framework == "meshwright":
        return f"{words}: {where}; the order of samples does not depend on the number of processes"
    return f"{words}: {where}; see that the order of samples does not depend on the number of processes"


def _passes(reading: DataVolume) -> str:
    """The number of passes over the data in words, where known."""
    if not reading.size_bytes:
        return ""
    of = f"the {size(reading.size_bytes)} of {reading.source}"
    if reading.passes is None:
        return f" of {of}"
    if reading.unit != "tokens":
        return f" ({number(reading.passes)} passes over {of})"
    each = reading.source_bytes_per_unit
    return f" (about {number(reading.passes)} passes over {of}, at {each:.0f} byte{'s' * (each > 1)} a token)"


STRATEGIES: tuple[tuple[str, Callable[[RuleContext], str]], ...] = (
    ("one device", _one_device),
    ("replicated data parallel", _replicated),
    ("data parallel with a distributed optimizer (ZeRO 1)", _spread),
    ("sharded data parallel (FSDP, ZeRO 3)", _sharded),
    ("tensor parallel", _tensor),
    ("pipeline parallel", _pipeline),
    ("context parallel", _context),
    ("expert parallel", _experts),
    ("saving memory", _memory),
    ("data", _data),
)
