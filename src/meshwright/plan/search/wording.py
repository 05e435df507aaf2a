"""Words for what was found: a Choice from an estimate, why it won or lost, and what was rejected, in groups."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from meshwright.cluster import GIB, Cluster, Device
from meshwright.divisors import divisors
from meshwright.layout import RECOMPUTE, Layout
from meshwright.plan.constants.regime import time_interval
from meshwright.plan.cost import Estimate, Estimator, usable_bytes
from meshwright.plan.cost.memory import memory_interval
from meshwright.plan.pipeline import TABLE
from meshwright.plan.reliability import LEAST_USEFUL, RunForecast
from meshwright.plan.request import PlanRequest
from meshwright.plan.result import Choice, Interval, Prediction, Rejected
from meshwright.plan.rules import refusals
from meshwright.plan.search.space import Space, with_micro_batch
from meshwright.plan.search.walk import TIE, OversizedLayout, Value, step_seconds

#: What torch.compile makes the first step take longer (bench/speed/train.py: 38 and 45 s on two cores).
COMPILE_SECONDS = 60.0
#: Entries of each kind that a plan lists as rejected; what is beyond is counted into them.
MOST_REJECTED = 40


def choice_of(
    estimate: Estimate,
    winner: Estimate | None,
    estimator: Estimator,
    request: PlanRequest,
    considered: int,
    chances: RunForecast,
    value: Value = step_seconds,
) -> Choice:
    """A Choice from an estimate; `winner` is None for the winner itself."""
    workload = estimator.workload
    names = [block.name for block in workload.card.blocks]
    edges = zip(estimate.first_blocks, (*estimate.first_blocks[1:], len(names)), strict=True)
    predicted = _prediction(estimate, estimator, chances)
    level = False
    if winner is None:
        why = _why_best(estimate, workload.cluster.device, considered, request.objective)
    else:
        _, apart = estimator.profile.interval("pairs", workload.cluster.device.kind)
        level = estimate.step_seconds <= apart * winner.step_seconds and request.objective == "time"
        why = why_lost(estimate, winner, value)
        why += "; cannot be told apart" if level else ""
    return Choice(
        layout=estimate.layout,
        precision=workload.precision,
        compiled=estimate.compiled,
        micro_batches=estimate.micro_batches,
        stages=tuple(tuple(names[start:stop]) for start, stop in edges),
        predicted=predicted,
        memory=estimate.memory,
        forward_seconds=estimate.forward_seconds,
        backward_seconds=estimate.backward_seconds,
        weight_seconds=estimate.weight_seconds,
        transfer_seconds=estimate.boundary_seconds or estimate.transfer_seconds,
        binding=binding(estimate),
        why=why,
        level=level,
        overlapped=estimate.pipeline_overlap,
    )


def compiles(estimate: Estimate, estimator: Estimator, request: PlanRequest) -> bool:
    """Whether to compile: as asked; on "auto" where the run is long enough to earn back twice the time that it takes.

    Never on "auto" where kernels are fused by hand, nor in a pipeline that splits backwards, which walks the graph of
    the backward pass: a compiled one has a single node.
    """
    if request.compile != "auto":
        return bool(request.compile)
    workload, layout = estimator.workload, estimate.layout
    if workload.framework.fused == "kernels" or (layout.pp > 1 and TABLE[layout.schedule].splits):
        return False
    if workload.cluster.device.kind == "cpu" and not shutil.which("g++"):  # inductor builds C++ there
        return False
    saved = estimate.step_seconds - estimator.compiled.estimate(layout).step_seconds
    return request.steps * saved > 2 * COMPILE_SECONDS


#: Parts of a step that are told even where they take nothing.
ALWAYS_SHOWN = ("compute", "communication", "bubble", "optimizer")


def parts(estimate: Estimate) -> dict[str, float]:
    """Seconds of the step by what they go to; their sum is the step."""
    return {name: seconds for name, seconds in estimate.breakdown.items() if seconds or name in ALWAYS_SHOWN}


def _prediction(estimate: Estimate, estimator: Estimator, chances: RunForecast) -> Prediction:
    workload, seconds = estimator.workload, estimate.step_seconds
    card, cluster = workload.card, workload.cluster
    low, high = time_interval(estimator.profile, workload, estimate.layout)
    flops = 3 * card.forward_flops * workload.global_batch
    speed = workload.global_batch * card.units_per_sample / seconds
    mfu = flops / (seconds * cluster.devices * cluster.device.flops[workload.precision])
    least, most = memory_interval(workload.framework.name)
    intervals = {
        "peak_bytes": (least * estimate.peak_bytes, most * estimate.peak_bytes),
        "tokens_per_second": (speed / high, speed / low),
        "mfu": (mfu / high, mfu / low),
        "goodput": chances.goodput_interval,
    }
    if chances.dollars is not None:
        frequent, rare = (chances.goodput / max(bound, LEAST_USEFUL) for bound in chances.goodput_interval)
        intervals["dollars"] = (chances.dollars * low * rare, chances.dollars * high * frequent)
    return Prediction(
        step_seconds=Interval(low * seconds, seconds, high * seconds),
        peak_bytes=estimate.peak_bytes,
        tokens_per_second=speed,
        mfu=mfu,
        dollars=chances.dollars,
        goodput=chances.goodput,
        breakdown=parts(estimate),
        intervals=intervals,
    )


def binding(estimate: Estimate) -> str:
    """What holds the layout back: memory where it had to recompute or offload, else the largest part of the step."""
    if estimate.layout.recompute != "none" or estimate.layout.offload:
        return "memory"
    shares = parts(estimate)
    return max(shares, key=lambda name: shares[name])


def _why_best(estimate: Estimate, device: Device, considered: int, objective: str) -> str:
    free = device.memory_bytes - estimate.peak_bytes
    shares = {name: seconds / estimate.step_seconds for name, seconds in parts(estimate).items()}
    share = ", ".join(f"{value:.0%} {name}" for name, value in shares.items() if value >= 0.005)
    word = "fastest" if objective == "time" else "cheapest"
    among = "the only layout that fits" if considered == 1 else f"the {word} of {considered} ways to split that fit"
    return f"{among}: {share}; {free / GIB:.1f} GiB of {device.memory_bytes / GIB:.1f} stay free on the fullest device"


def why_lost(estimate: Estimate, winner: Estimate, value: Value) -> str:
    """How much slower, and which part of the step grew most; of fewer or more devices, which `value` says to cost
    more, how much dearer."""
    if estimate.layout.devices != winner.layout.devices:
        return _why_dearer(estimate, winner, value)
    extra = estimate.step_seconds - winner.step_seconds
    mine, best = parts(estimate), parts(winner)
    grew = max(mine, key=lambda name: mine[name] - best.get(name, 0.0))
    slower = extra / winner.step_seconds
    if extra <= TIE * winner.step_seconds:
        return f"level within {TIE:.0%}, but less simple"
    cause = f"{mine[grew] - best.get(grew, 0.0):.3g} s more {grew}"
    if RECOMPUTE.index(estimate.layout.recompute) > RECOMPUTE.index(winner.layout.recompute):
        cause += f", and fits only with recompute={estimate.layout.recompute}"
    elif estimate.layout.offload and not winner.layout.offload:
        cause += ", and fits only with offload"
    return f"{slower:.0%} slower: {cause}"


def _why_dearer(estimate: Estimate, winner: Estimate, value: Value) -> str:
    times = value(estimate) / value(winner)
    faster = winner.step_seconds / estimate.step_seconds
    if times <= 1 + TIE:
        return f"level within {TIE:.0%} of the price, but less simple"
    speed = f"{faster:.2g} times as fast" if faster >= 1 else f"{1 / faster:.2g} times as slow"
    return f"{times - 1:.0%} dearer a sample on {estimate.layout.devices} devices, where it is {speed}"


def oversized(missing: list[OversizedLayout], cluster: Cluster) -> list[Rejected]:
    """What does not fit, the nearest miss first; of many, the nearest of each (tp, pp, cp, ep)."""
    room = usable_bytes(cluster.device)
    ordered = sorted(missing, key=lambda e: (e.peak_bytes, str(e.layout)))
    return [Rejected(one.layout, does_not_fit(one.peak_bytes, room), count) for one, count in _grouped(ordered)]


def does_not_fit(peak_bytes: int, room: int) -> str:
    needs, misses = peak_bytes / GIB, (peak_bytes - room) / GIB
    return f"does not fit: needs {needs:.1f} GiB a device at best, {misses:.1f} GiB more than there is room for"


Entry = TypeVar("Entry", Estimate, OversizedLayout)


def _grouped(ordered: list[Entry]) -> list[tuple[Entry, int]]:
    """All of a few; of more, the first of each group with how many it stands for, the last one for all the rest."""
    if len(ordered) <= MOST_REJECTED:
        return [(one, 1) for one in ordered]
    groups: dict[tuple[int, ...], list[Entry]] = {}
    for one in ordered:
        layout = one.layout
        groups.setdefault((layout.tp, layout.pp, layout.cp, layout.ep), []).append(one)
    firsts = [(several[0], len(several)) for several in groups.values()]
    kept, rest = firsts[:MOST_REJECTED], firsts[MOST_REJECTED:]
    if rest:
        kept[-1] = (kept[-1][0], kept[-1][1] + sum(count for _, count in rest))
    return kept


def outranked(order: list[Estimate], shown: Sequence[Layout], winner: Estimate, value: Value) -> list[Rejected]:
    """What fits, is worse, and is no runner-up either."""
    known = {(o.dp, o.tp, o.pp, o.cp, o.ep) for o in shown}
    lost = [e for e in order if (e.layout.dp, e.layout.tp, e.layout.pp, e.layout.cp, e.layout.ep) not in known]
    best = value(winner)
    return [
        Rejected(estimate.layout, f"fits, and loses by {value(estimate) / best - 1:.0%}", count)
        for estimate, count in _grouped(lost)
    ]


def rejected_by_rules(space: Space) -> list[Rejected]:
    """Degrees that divide the devices, one at a time beside data parallelism, and the rule that refuses each."""
    lost: list[Rejected] = []
    devices = space.workload.cluster.devices
    tried = [Layout(dp=devices)]
    for degree in (d for d in divisors(devices) if d > 1):
        for name in ("tp", "pp", "cp") if space.offers("cp") else ("tp", "pp"):
            tried.append(replace(Layout(dp=devices // degree), **{name: degree}))  # type: ignore[arg-type]
    tried += [Layout(dp=devices, ep=d) for d in divisors(devices)[1:] if space.workload.facts.experts]
    for layout in tried:
        layout = with_micro_batch(space, layout)
        broken = refusals(space.workload.query(layout))
        if broken:
            lost.append(Rejected(layout, broken[0].reason))
    return lost
