"""The strategies and tools that suit a model, its data, the hardware and the team, in words, and why.

A tool with a row in FRAMEWORKS is judged by the plan of the job under that row: its splits, whether it fits, how long a
step takes. The others are judged by the layout of the best of these. TOOLS adds what no plan says: the devices that a
tool runs on and the experience that it needs (facts of late 2026, not popularity).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.errors import CannotWork, Problem
from meshwright.layout import Layout
from meshwright.plan.advice.strategies import (
    EXPERIENCE,
    STRATEGIES,
    Candidate,
    DataVolume,
    FrameworkPlan,
    RuleContext,
    Situation,
    seconds,
)
from meshwright.plan.constants import default_profile
from meshwright.plan.rules import FRAMEWORKS

#: The framework that gives the strategies a layout where no tool with a row runs.
FALLBACK = "meshwright"
KINDS = {"cpu": "CPUs", "cuda": "GPUs", "tpu": "TPUs", "gaudi": "Gaudi", "trainium": "Trainium"}


@dataclass(frozen=True)
class Reason:
    """A strategy that suits, and why."""

    strategy: str
    why: str


@dataclass(frozen=True)
class Tool:
    """A tool: the kinds of device that it runs on, the least experience that it needs, and either its row in FRAMEWORKS
    or the fields of the Layout that it splits by (`own_splits`).

    `models` is "any", or "language" for tools that bring their own transformer. `caution` is a warning for devices
    other than CPUs, `ended` says when its development ended.
    """

    name: str
    kinds: frozenset[str]
    least_experience: str
    models: str
    good_for: str
    framework: str = ""
    own_splits: frozenset[str] = frozenset()
    caution: str = ""
    ended: str = ""

    @property
    def splits(self) -> frozenset[str]:
        if not self.framework:
            return self.own_splits
        offers = FRAMEWORKS[self.framework].offers
        return offers.fields | ({"offload"} if offers.offload else set())

    @property
    def short(self) -> str:
        """The name within a sentence."""
        return self.name.partition("(")[2].rstrip(")") or self.name.partition(",")[0]


@dataclass(frozen=True)
class Verdict:
    """A tool with the reasons for or against it, and its plan if it has one."""

    tool: str
    suits: bool
    why: str
    framework: str | None = None
    step_seconds: float | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class Advice:
    """The strategies that suit, most important first, and a verdict on every tool, the best first."""

    strategies: tuple[Reason, ...]
    tools: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _row(name: str, framework: str, kinds: str, experience: str, models: str, good_for: str, **more: Any) -> Tool:
    return Tool(name, frozenset(kinds.split()), experience, models, good_for, framework, **more)


def _tool(name: str, splits: str, kinds: str, experience: str, models: str, good_for: str, ended: str = "") -> Tool:
    own = frozenset(splits.split())
    return Tool(name, frozenset(kinds.split()), experience, models, good_for, own_splits=own, ended=ended)


TOOLS: tuple[Tool, ...] = (
    _row("Meshwright", "meshwright", "cpu cuda", "new", "any",
         "one job file, a layout planned and proven, runs that resume exactly, a server",
         caution="not yet run on GPUs"),
    _tool("PyTorch DDP", "dp", "cpu cuda", "new", "any", "a model that fits one device, in your own loop"),
    _row("PyTorch FSDP2 (torchtitan)", "torchtitan", "cuda", "some", "language",
         "language models in plain PyTorch that you mean to change"),
    _row("Megatron-LM, Megatron Bridge", "megatron-bridge", "cuda", "expert", "language",
         "the highest throughput on hundreds of GPUs or more, for those who can keep its options straight"),
    _row("DeepSpeed", "deepspeed", "cpu cuda gaudi", "some", "any",
         "models larger than the devices' memory, with optimizer state on the host or on disk"),
    _tool("Ray Train", "dp shard", "cpu cuda", "some", "any",
          "clusters that already run Ray: it starts and restarts workers and leaves the split to PyTorch"),
    _tool("JAX with MaxText", "dp shard tp pp cp ep", "tpu cuda", "expert", "language",
          "language models in JAX, on TPUs first of all"),
    _tool("Horovod", "dp", "cpu cuda", "some", "any", "data parallelism over MPI", "no release since 2023"),
    _tool("Mesh TensorFlow", "dp tp", "tpu", "expert", "any", "tensors split in TensorFlow 1", "superseded by JAX"),
    _tool("MXNet", "dp", "cpu cuda", "some", "any", "parameter servers", "retired by Apache in 2023"),
    _tool("TorchServe", "", "cpu cuda", "some", "any", "serving", "ended in 2025"),
)  # fmt: skip


def situation_of(
    card: Card,
    cluster: Cluster,
    reading: DataVolume,
    *,
    built_in: bool,
    experience: str,
    untrained: str = "",
    pinned: frozenset[str] = frozenset(),
) -> Situation:
    """The facts of a job. Raises InputError for an unknown experience."""
    return Situation(
        cluster=cluster,
        parameters=card.parameter_elements,
        language_model=card.unit == "tokens",
        built_in=built_in,
        experts=any(block.experts for block in card.blocks),
        reading=reading,
        experience=experience,
        margin=default_profile().interval("pairs", cluster.device.kind)[1],
        untrained=untrained,
        pinned=pinned,
    )


def frameworks(situation: Situation) -> tuple[str, ...]:
    """The rows of FRAMEWORKS to plan the job with: those of tools that run this model on these devices."""
    rows = tuple(tool.framework for tool in TOOLS if tool.framework and not _cannot_run(tool, situation))
    return rows or (FALLBACK,)


def advise(situation: Situation, plans: Mapping[str, FrameworkPlan | CannotWork]) -> Advice:
    """Strategies and tools for a situation. `plans` has the plan, or the failure, of each of `frameworks(situation)`.

    Raises CannotWork, with the problems of all, where none of them has a layout.
    """
    layouts = {row: plan for row, plan in plans.items() if isinstance(plan, FrameworkPlan)}
    if not layouts:
        raise CannotWork(_problems(plans))
    judgements = [_judge(tool, situation, plans) for tool in TOOLS]
    suiting = _order([one for one in judgements if one.best_plan and not one.against], situation.margin)
    near = suiting or _nearest(judgements, situation.margin)
    chosen = near[0].plan if near else layouts[FALLBACK]
    judgements = [one if one.tool.framework else _judge_by_layout(one, situation, chosen) for one in judgements]
    unplanned = [one for one in judgements if not one.best_plan and not one.against]
    verdicts = [_verdict(one, situation, near) for one in (*suiting, *unplanned, *(o for o in judgements if o.against))]
    best = next(tool for tool in TOOLS if tool.framework == chosen.framework)
    others = [Candidate(o.tool.short, o.tool.splits, not o.against, o.best_plan) for o in judgements if o.tool != best]
    context = RuleContext(situation, best.short, best.splits, bool(suiting), chosen, tuple(others))
    reasons = [Reason(name, why) for name, rule in STRATEGIES if (why := rule(context))]
    if not suiting and not unplanned:
        reasons.insert(0, Reason("no tool suits", _none_suits(near, situation)))
    return Advice(tuple(reasons), tuple(verdicts))


@dataclass(frozen=True)
class _Judgement:
    """A tool with all reasons against it, and its plan if it has one."""

    tool: Tool
    against: tuple[str, ...]
    best_plan: FrameworkPlan | None

    @property
    def plan(self) -> FrameworkPlan:
        assert self.best_plan is not None
        return self.best_plan


def _judge(tool: Tool, situation: Situation, plans: Mapping[str, FrameworkPlan | CannotWork]) -> _Judgement:
    if tool.ended:
        return _Judgement(tool, (f"not kept any more: {tool.ended}",), None)
    against = _cannot_run(tool, situation)
    plan = None if against else plans.get(tool.framework)
    if EXPERIENCE.index(tool.least_experience) > EXPERIENCE.index(situation.experience):
        against.append(f"asks for more experience ({tool.least_experience}) than the team's ({situation.experience})")
    if isinstance(plan, CannotWork):
        return _Judgement(tool, (*against, plan.problems[0].what), None)
    return _Judgement(tool, tuple(against), plan)


def _cannot_run(tool: Tool, situation: Situation) -> list[str]:
    """The reasons why a tool cannot train this model on these devices with any layout."""
    against = []
    if situation.kind not in tool.kinds:
        against.append(f"does not run on {KINDS[situation.kind]}")
    if tool.models == "language" and not (situation.language_model and situation.built_in):
        against.append("brings its own language models; this one is yours")
    if tool.framework == "meshwright" and situation.untrained:
        against.append(f"plans this model, does not train it yet ({situation.untrained})")
    return against


def _judge_by_layout(one: _Judgement, situation: Situation, chosen: FrameworkPlan) -> _Judgement:
    """A tool without a row, judged by the layout that is advised."""
    layout = chosen.layout
    needs = {name for name in ("dp", "shard", "tp", "pp", "vpp", "cp", "ep") if getattr(layout, name) > 1}
    needs |= {"offload"} if layout.offload else set()
    needs |= {"shard"} if chosen.spreads and not situation.fits_one_device else set()
    lacks = sorted(needs - one.tool.splits)
    if not lacks or one.tool.ended:
        return one
    return replace(one, against=(*one.against, f"does not split by {', '.join(lacks)}, as the layout advised does"))


def _order(judgements: Sequence[_Judgement], margin: float) -> list[_Judgement]:
    """The quickest first; within the margin, the one that needs the least experience first."""
    rest, order = sorted(judgements, key=lambda one: one.plan.step_seconds), []
    while rest:
        level = [one for one in rest if one.plan.step_seconds <= margin * rest[0].plan.step_seconds]
        order += sorted(level, key=lambda one: EXPERIENCE.index(one.tool.least_experience))
        rest = rest[len(level) :]
    return order


def _nearest(judgements: Sequence[_Judgement], margin: float) -> list[_Judgement]:
    """Tools with a plan, where none suits: those that need the least experience first."""
    order = _order([one for one in judgements if one.best_plan], margin)
    return sorted(order, key=lambda one: EXPERIENCE.index(one.tool.least_experience))


def _verdict(one: _Judgement, situation: Situation, order: Sequence[_Judgement]) -> Verdict:
    """The verdict on a tool; `order` has the tools that its time is compared with."""
    tool, plan = one.tool, one.best_plan
    words = list(one.against)
    if plan is not None:
        words.append(_time_words(one, situation, order))
    if not one.against:
        words.append(f"for {tool.good_for}" + ("" if plan else "; not predicted"))
        words += [tool.caution] if tool.caution and situation.kind != "cpu" else []
    planned = (tool.framework, plan.step_seconds, plan.layout) if plan else (None, None, None)
    return Verdict(tool.name, not one.against, "; ".join(words), *planned)


def _time_words(one: _Judgement, situation: Situation, order: Sequence[_Judgement]) -> str:
    """The predicted step, compared with the quickest of `order`."""
    words = f"predicted {seconds(one.plan.step_seconds)} a step as {one.plan.layout}"
    quickest = min(order, key=lambda other: other.plan.step_seconds)
    times = one.plan.step_seconds / quickest.plan.step_seconds
    whose, margin = f"{quickest.tool.short}'s {seconds(quickest.plan.step_seconds)}", situation.margin
    if one.tool == quickest.tool:
        return words + (", the shortest of those that suit" if not one.against and len(order) > 1 else "")
    apart = f"{abs(times - 1):.0%} {'more' if times > 1 else 'less'}"
    if apart.startswith("0%"):
        return f"{words}, as long as {whose}"
    if max(times, 1 / times) <= margin:
        return f"{words}, level with {whose}: {apart} is within the plan's margin of {margin - 1:.0%}"
    return f"{words}, {apart} than {whose}"


def _none_suits(near: Sequence[_Judgement], situation: Situation) -> str:
    if not near:
        return f"what follows is as {FALLBACK.capitalize()} would plan it; each tool says why it was left out"
    tool = near[0].tool
    return (
        f"{tool.short} is the closest, but needs more experience ({tool.least_experience}) than the team has "
        f"({situation.experience}); what follows is about its plan"
    )


def _problems(plans: Mapping[str, FrameworkPlan | CannotWork]) -> list[Problem]:
    """The problems of every framework."""
    return [
        replace(problem, what=f"under {row}: {problem.what}")
        for row, failed in plans.items()
        if isinstance(failed, CannotWork)
        for problem in failed.problems
    ]
