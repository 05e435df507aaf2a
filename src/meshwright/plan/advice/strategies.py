"""Which ways to split a job pay, and how its data is best kept: a table of rules, each with its reason in words.

The rules are told of the facts of the job (Situation), of the tool that suits best with the layout that was planned for
it, and of the other tools, since what one does not offer another may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.cluster import Cluster
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.layout import Layout
from meshwright.plan.rules import FRAMEWORKS

EXPERIENCE = ("new", "some", "expert")
#: Bytes a parameter that mixed-precision AdamW keeps: fp32 master and two moments, a gradient, a copy to compute with.
TRAINING_BYTES = 16
#: Of these, master and moments: what a distributed optimizer spreads.
OPTIMIZER_BYTES = 12
#: Share of a device's memory that weights, gradients and optimizer may take and leave room for activations.
STATE_SHARE = 0.8
#: Bytes a second that each node may read from storage which all share: what a link of one gigabit carries.
SHARED_STORAGE = 100e6


@dataclass(frozen=True)
class DataVolume:
    """What a run reads. `size_bytes` of `source` is None where it is not known; so many of its bytes make a unit of the
    card (a token, a sample), and so many are read for one once it is indexed; 0 where that is not known."""

    source: str
    unit: str
    units_per_step: int
    steps: int
    size_bytes: int | None = None
    source_bytes_per_unit: float = 0.0
    stored_bytes_per_unit: float = 0.0

    @property
    def passes(self) -> float | None:
        """How often the run goes through its source."""
        if not self.size_bytes or not self.source_bytes_per_unit:
            return None
        return self.steps * self.units_per_step * self.source_bytes_per_unit / self.size_bytes


@dataclass(frozen=True)
class Situation:
    """What the advice depends on beside the plans. `experience` is one of EXPERIENCE. `untrained` says what `train`
    trains where this model is none of it. `margin` is the ratio of two layouts' predicted times below which they cannot
    be told apart.

    Raises InputError for an unknown experience.
    """

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
        """The kind of device as tools tell them apart: "cpu", "cuda" (AMD's too), "tpu", "gaudi" or "trainium"."""
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
        """Whether the optimizer's state is spread over ranks that hold whole weights."""
        layout, row = self.layout, FRAMEWORKS[self.framework].planned
        return row.optimizer_shard == "dp" and layout.shard == 1 and layout.dp * layout.cp > 1


@dataclass(frozen=True)
class Candidate:
    """A tool as it stands here: what it splits by, whether it suits, and its plan where there is one."""

    name: str
    splits: frozenset[str]
    suits: bool
    planned: FrameworkPlan | None


@dataclass(frozen=True)
class Facts:
    """What a rule is told. `planned` is the plan under `tool`, the best that `suits`; or, where none with a plan does,
    that comes nearest. `others` are the other tools of the table."""

    facts: Situation
    tool: str
    splits: frozenset[str]
    suits: bool
    planned: FrameworkPlan
    others: tuple[Candidate, ...]

    @property
    def layout(self) -> Layout:
        return self.planned.layout

    def elsewhere(self, name: str) -> list[tuple[Candidate, FrameworkPlan]]:
        """Other tools whose plans split by this field of the Layout, the quickest first."""
        found = [(one, one.planned) for one in self.others if one.planned and getattr(one.planned.layout, name) > 1]
        return sorted(found, key=lambda pair: pair[1].step_seconds)

    def link(self, extent: int) -> str:
        """The slowest link of a group within `extent` adjacent ranks, in words."""
        cluster = self.facts.cluster
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


def _one_device(t: Facts) -> str:
    f = t.facts
    if f.cluster.devices > 1:
        return ""
    memory = f.cluster.device.memory_bytes
    state = f"there is one device, and weights, gradients and optimizer of {size(f.state_bytes)}"
    if f.fits_one_device:
        return f"{state} fit its {size(memory)}"
    fit = "barely leave room in" if f.state_bytes < memory else "are more than"
    return f"{state} {fit} its {size(memory)}: it works as {t.layout}"


def _replicated(t: Facts) -> str:
    f, layout = t.facts, t.layout
    copies = layout.dp * layout.cp
    if copies == 1 or layout.shard > 1 or (t.planned.spreads and not f.fits_one_device):
        return ""
    if layout.tp * layout.pp > 1:
        return f"{copies} copies, each split over {layout.tp * layout.pp} devices, only meet to add up gradients"
    return (
        f"weights, gradients and optimizer of {size(f.state_bytes)} fit every device: copies that only meet to add up "
        "gradients move the least"
    )


def _spread(t: Facts) -> str:
    f, copies = t.facts, t.layout.dp * t.layout.cp
    if not t.planned.spreads or f.fits_one_device:
        return ""
    return (
        f"{size(f.state_bytes)} of weights, gradients and optimizer against {size(f.cluster.device.memory_bytes)} a "
        f"device: each data-parallel rank keeps its weights whole, and the optimizer's part, "
        f"{size(f.parameters * OPTIMIZER_BYTES)}, is spread over the {copies} of them"
    )


def _sharded(t: Facts) -> str:
    f, layout = t.facts, t.layout
    if layout.shard == 1:
        return ""
    parts = layout.shard * layout.tp * layout.pp
    first = " and ".join(name for name in ("tp", "pp") if getattr(layout, name) > 1)
    over = f"sharded over {layout.shard} devices" + (f", on top of the split by {first}" if first else "")
    kept = f.parameters * (TRAINING_BYTES - OPTIMIZER_BYTES * layout.offload)
    each = f"{size(kept / parts)} each" + " without the optimizer" * layout.offload
    return (
        f"{size(f.state_bytes)} of weights, gradients and optimizer against {size(f.cluster.device.memory_bytes)} a "
        f"device: {over}, it is {each}, for gathering the weights anew to compute with"
    )


def _tensor(t: Facts) -> str:
    cluster, tp = t.facts.cluster, t.layout.tp
    if tp == 1:
        return ""
    if tp > cluster.domain:
        return f"every layer waits for it, and over {tp} devices it has to cross {t.link(tp)}"
    words = f"every layer waits for it, so it stays inside a node, on {t.link(tp)}"
    if cluster.devices > cluster.domain:
        times = cluster.intra.bytes_per_second / cluster.inter.bytes_per_second
        words += f", {times:.0f} times the network's speed" if times > 1 else ""
    return words


def _pipeline(t: Facts) -> str:
    if t.layout.pp == 1:
        return ""
    return (
        f"{t.layout.pp} stages hand on one activation where sharding would move the weights, here over "
        f"{t.link(t.layout.devices)}; many micro-batches keep the bubble small"
    )


def _context(t: Facts) -> str:
    layout = t.layout
    if layout.cp > 1:
        return (
            f"each sequence is split over {layout.cp} devices, which leaves each its part of the activations; keys and "
            f"values are passed on over {t.link(layout.cp * layout.tp)}"
        )
    quickest = next(iter(t.elsewhere("cp")), None)
    if quickest is None or quickest[1].step_seconds * t.facts.margin > t.planned.step_seconds:
        return ""
    without = f"the best layout of {t.tool} does without" if "cp" in t.splits else f"{t.tool} does not offer it"
    return f"{without}; {_would(t, *quickest, 'cp', 'splits each sequence')}"


def _experts(t: Facts) -> str:
    if not t.facts.experts:
        return ""
    layout = t.layout
    if layout.ep > 1:
        return (
            f"the experts of a layer are spread over {layout.ep} devices, and tokens travel to them over "
            f"{t.link(layout.ep * layout.tp)}"
        )
    together = "the experts of a layer stay together: "
    if t.facts.cluster.devices == 1:
        return together + "there is one device"
    if "ep" in t.facts.pinned:
        return together + "the job pins ep=1"
    spread = [_would(t, other, plan, "ep", "spreads them") for other, plan in t.elsewhere("ep")]
    if "ep" in t.splits:
        return "; ".join([f"{together}no layout of {t.tool} that spreads them is quicker here and fits", *spread])
    able = [other for other in t.others if "ep" in other.splits]
    if planned := [other.name for other in able if other.planned]:
        rest = f"{_listed(planned)} can, and the best layout of {'each' if len(planned) > 1 else 'it'} does without"
    elif suiting := [other.name for other in able if other.suits]:
        rest = f"{_listed(suiting)} can"
    else:
        rest = f"of the tools that do ({_listed([other.name for other in able])}) none suits here"
    return "; ".join([f"{together}{t.tool} does not spread them", *(spread or [rest])])


def _would(t: Facts, other: Candidate, plan: FrameworkPlan, name: str, does: str) -> str:
    """What another tool's plan makes of a field of the Layout, and what that takes."""
    fit = "" if other.suits else ", which does not suit here,"
    mine, theirs = seconds(t.planned.step_seconds), seconds(plan.step_seconds)
    return f"{other.name}{fit} {does} over {getattr(plan.layout, name)} devices, for {theirs} a step against {mine}"


def _memory(t: Facts) -> str:
    layout = t.layout
    words = []
    if layout.recompute != "none":
        some = "all" if layout.recompute == "full" else "some"
        words.append(f"{some} activations of a block are computed again in its backward pass, not kept")
    if layout.offload:
        words.append(f"the optimizer's {size(t.facts.parameters * OPTIMIZER_BYTES)} stay in the hosts' memory")
    return ", and ".join(words) + "; without that it does not fit, or takes longer" if words else ""


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _data(t: Facts) -> str:
    reading, nodes = t.facts.reading, t.facts.cluster.nodes
    each_second = reading.units_per_step / t.planned.step_seconds
    # ranks of one data-parallel copy read the same samples, and a copy may span several nodes
    rate = each_second * reading.stored_bytes_per_unit / min(nodes, t.layout.dp)
    words = f"a run reads {number(reading.steps * reading.units_per_step)} {reading.unit}{_passes(reading)}, "
    words += f"{number(each_second)} a second"
    words += f" or {size(rate)}/s{' a node' * (nodes > 1)}" if rate else ""
    if nodes == 1:
        where = "keep the data on the machine that trains"
    elif not rate:
        where = "put a copy near each node, or on storage that gives all of them so many"
    elif rate <= SHARED_STORAGE:
        where = f"storage that the {nodes} nodes share is enough"
    else:
        where = f"put a copy near each of {nodes} nodes: it is more than the {size(SHARED_STORAGE)}/s of a gigabit link"
    if t.suits and t.planned.framework == "meshwright":
        return f"{words}: {where}; the order of samples does not depend on the number of processes"
    return f"{words}: {where}; see that the order of samples does not depend on the number of processes"


def _passes(reading: DataVolume) -> str:
    """How often the run goes through its data, where that is known."""
    if not reading.size_bytes:
        return ""
    of = f"the {size(reading.size_bytes)} of {reading.source}"
    if reading.passes is None:
        return f" of {of}"
    if reading.unit != "tokens":
        return f" ({number(reading.passes)} passes over {of})"
    each = reading.source_bytes_per_unit
    return f" (about {number(reading.passes)} passes over {of}, at {each:.0f} byte{'s' * (each > 1)} a token)"


STRATEGIES: tuple[tuple[str, Callable[[Facts], str]], ...] = (
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
