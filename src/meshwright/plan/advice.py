"""Which strategy and which tools suit a model, its data, the hardware and the team, in words, and why.

Two tables decide: STRATEGIES (when a way to split pays, read from top to bottom) and TOOLS (what each can do, and the
experience it asks for). Tools are facts of late 2026: what a tool runs, not how well it is liked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.layout import Layout

EXPERIENCE = ("new", "some", "expert")
GB = 1e9
#: Bytes a parameter that mixed-precision AdamW keeps: fp32 master and two moments, a gradient, a copy to compute with.
TRAINING_BYTES = 16


@dataclass(frozen=True)
class Situation:
    """What the advice depends on. `needs` are the fields of the Layout above one; `experience` one of EXPERIENCE."""

    parameters: int
    state_bytes: int
    device_bytes: int
    devices: int
    nodes: int
    device_kind: str  # "cpu", "cuda", or what the table of devices says
    intra_bytes_per_second: float
    inter_bytes_per_second: float
    language_model: bool
    built_in: bool  # a family of ours, or a folder of one
    experts: bool
    needs: frozenset[str]
    experience: str

    @property
    def fits_one_device(self) -> bool:
        return self.state_bytes < 0.8 * self.device_bytes


@dataclass(frozen=True)
class Reason:
    """A strategy that suits, and why."""

    strategy: str
    why: str


@dataclass(frozen=True)
class Tool:
    """A framework: the layouts it `splits`, the kinds of device it runs on, the least experience that it asks for.

    `models` is "any", or "language" for those that bring their own transformer. `ended` says since when it is not kept.
    """

    name: str
    splits: frozenset[str]
    kinds: frozenset[str]
    least_experience: str
    models: str
    good_for: str
    ended: str = ""


@dataclass(frozen=True)
class Verdict:
    """A tool with what speaks for or against it here."""

    tool: str
    suits: bool
    why: str


@dataclass(frozen=True)
class Advice:
    """Strategies that suit, most important first, and every tool of the table with its verdict, suiting ones first."""

    strategies: tuple[Reason, ...]
    tools: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _tool(name: str, splits: str, kinds: str, experience: str, models: str, good_for: str, ended: str = "") -> Tool:
    return Tool(name, frozenset(splits.split()), frozenset(kinds.split()), experience, models, good_for, ended)


TOOLS: tuple[Tool, ...] = (
    _tool("Meshwright", "dp shard tp pp", "cpu cuda", "new", "any",
          "one job file, a layout planned and proven, runs that resume exactly, a server; not yet measured on GPUs"),
    _tool("PyTorch DDP", "dp", "cpu cuda", "new", "any", "a model that fits one device, in your own loop"),
    _tool("PyTorch FSDP2 (torchtitan)", "dp shard tp pp cp ep", "cuda", "some", "language",
          "language models in plain PyTorch that you mean to change"),
    _tool("Megatron-LM, Megatron Bridge", "dp shard tp pp vpp cp ep", "cuda", "expert", "language",
          "the highest throughput on hundreds of GPUs or more, for those who can keep its options straight"),
    _tool("DeepSpeed", "dp shard pp ep offload", "cpu cuda", "some", "any",
          "models larger than the GPUs' memory, with optimizer state on the host or on disk"),
    _tool("Ray Train", "dp shard", "cpu cuda", "some", "any",
          "clusters that already run Ray: it starts and restarts workers and leaves the split to PyTorch"),
    _tool("JAX with MaxText", "dp shard tp pp cp ep", "tpu cuda", "expert", "language", "TPUs"),
    _tool("Horovod", "dp", "cpu cuda", "some", "any", "data parallelism over MPI", "no release since 2023"),
    _tool("Mesh TensorFlow", "dp tp", "tpu", "expert", "any", "tensors split in TensorFlow 1", "superseded by JAX"),
    _tool("MXNet", "dp", "cpu cuda", "some", "any", "parameter servers", "retired by Apache in 2023"),
    _tool("TorchServe", "", "cpu cuda", "some", "any", "serving", "ended in 2025"),
)  # fmt: skip


def situation(card: Card, cluster: Cluster, layout: Layout, *, built_in: bool, experience: str) -> Situation:
    """The facts of a planned job."""
    return Situation(
        parameters=card.parameter_elements,
        state_bytes=card.parameter_elements * TRAINING_BYTES,
        device_bytes=cluster.device.memory_bytes,
        devices=cluster.devices,
        nodes=cluster.nodes,
        device_kind=cluster.device.kind,
        intra_bytes_per_second=cluster.intra.bytes_per_second,
        inter_bytes_per_second=cluster.inter.bytes_per_second,
        language_model=card.unit == "tokens",
        built_in=built_in,
        experts=any("expert" in parameter.axes for parameter in card.parameters),
        needs=frozenset(n for n in ("dp", "shard", "tp", "pp", "vpp", "cp", "ep") if getattr(layout, n) > 1)
        | (frozenset({"offload"}) if layout.offload else frozenset()),
        experience=experience,
    )


def advise(facts: Situation) -> Advice:
    """Strategies and tools for these facts. Raises ValueError for an unknown experience."""
    if facts.experience not in EXPERIENCE:
        raise ValueError(f"experience '{facts.experience}' is none of {', '.join(EXPERIENCE)}")
    strategies = tuple(Reason(name, why) for name, rule in STRATEGIES if (why := rule(facts)))
    verdicts = [_verdict(tool, facts) for tool in TOOLS]
    return Advice(strategies, tuple(sorted(verdicts, key=lambda verdict: not verdict.suits)))


def _verdict(tool: Tool, facts: Situation) -> Verdict:
    kind = "tpu" if facts.device_kind.startswith("tpu") else facts.device_kind
    lacks = sorted(facts.needs - tool.splits)
    against = []
    if tool.ended:
        against.append(f"not kept any more: {tool.ended}")
    if kind not in tool.kinds:
        against.append(f"does not run on {facts.device_kind}")
    if lacks:
        against.append(f"the layout of this plan uses {', '.join(lacks)}, which it does not split by")
    if tool.models == "language" and not (facts.language_model and facts.built_in):
        against.append("brings its own language models; this one is yours")
    if EXPERIENCE.index(tool.least_experience) > EXPERIENCE.index(facts.experience):
        against.append(f"asks for more experience ({tool.least_experience}) than the team's ({facts.experience})")
    return Verdict(tool.name, not against, "; ".join(against) if against else f"for {tool.good_for}")


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / GB:,.3g} GB"


def _one_device(f: Situation) -> str:
    if f.devices > 1:
        return ""
    return f"one device, and weights, gradients and optimizer of {_gb(f.state_bytes)} " + (
        f"fit its {_gb(f.device_bytes)}" if f.fits_one_device else "barely fit: recompute activations, or get another"
    )


def _replicated(f: Situation) -> str:
    if f.devices == 1 or not f.fits_one_device or "shard" in f.needs:
        return ""
    return (
        f"weights, gradients and optimizer of {_gb(f.state_bytes)} fit every device: copies that only meet to add up "
        "gradients move the least"
    )


def _sharded(f: Situation) -> str:
    if f.devices == 1 or (f.fits_one_device and "shard" not in f.needs):
        return ""
    each = f.state_bytes / f.devices
    return (
        f"{_gb(f.state_bytes)} of weights, gradients and optimizer against {_gb(f.device_bytes)} a device: sharded "
        f"over all {f.devices} it is {_gb(each)} each, for one more gather of the weights a pass"
    )


def _tensor(f: Situation) -> str:
    if "tp" not in f.needs:
        return ""
    words = f"every layer waits for it, so it stays inside a node, on the {_gb(f.intra_bytes_per_second)}/s link"
    if f.nodes > 1:
        words += f" ({f.intra_bytes_per_second / f.inter_bytes_per_second:.0f} times the network's speed)"
    return words


def _pipeline(f: Situation) -> str:
    if "pp" not in f.needs:
        return ""
    return (
        "stages hand on one activation where sharding would move the weights: it suits the slow link "
        f"({_gb(f.inter_bytes_per_second)}/s a device), and wants many micro-batches to keep the bubble small"
    )


def _context(f: Situation) -> str:
    return "sequences too long for one device's activations are split along their length" if "cp" in f.needs else ""


def _experts(f: Situation) -> str:
    if not f.experts:
        return ""
    if "ep" in f.needs:
        return "experts live on different devices, and tokens travel to them: keep that inside a node where it can be"
    return "the experts of a layer stay together: with this many devices moving tokens would cost more than it saves"


def _data(f: Situation) -> str:
    if f.nodes == 1:
        return "keep the data on this machine; the order of samples does not depend on the number of processes"
    return f"put a copy of the data near each of {f.nodes} nodes, or on storage that all read: each reads its own part"


STRATEGIES: tuple[tuple[str, Callable[[Situation], str]], ...] = (
    ("one device", _one_device),
    ("replicated data parallel", _replicated),
    ("sharded data parallel (FSDP, ZeRO)", _sharded),
    ("tensor parallel", _tensor),
    ("pipeline parallel", _pipeline),
    ("context parallel", _context),
    ("expert parallel", _experts),
    ("data", _data),
)
