"""The result of a search in words: Choices, why each won or lost, and the rejected layouts in groups."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
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
from meshwright.plan.result import Choice, Interval, Prediction, RejectedLayout
from meshwright.plan.rules import refusals
from meshwright.plan.search.space import Space, with_micro_batch
from meshwright.plan.search.walk import TIE, OversizedLayout, Value, step_seconds

#: The time of torch.compile in the first step (bench/speed/train.py: 38 and 45 s on two cores).
COMPILE_SECONDS = 60.0
#: The most rejected layouts of each kind in a plan; the last also stands for the rest.
MOST_REJECTED = 40


def choice_of(
    estimate: Estimate,
    winner: Estimate | None,
    estimator: Estimator,
    request: PlanRequest,
    considered: int,
    forecast: RunForecast,
    value: Value = step_seconds,
) -> Choice:
    """The Choice of an estimate; `winner` is None for the winner itself. `considered` ways to split fit."""
    workload = estimator.workload
    names = [block.name for block in workload.card.blocks]
    edges = zip(estimate.first_blocks, (*estimate.first_blocks[1:], len(names)), strict=True)
    predicted = _prediction(estimate, estimator, forecast)
    level = False
    if winner is None:
        why = _why_best(estimate, workload.cluster.device, considered, request.objective)
    else:
        _, margin = estimator.profile.interval("pairs", workload.cluster.device.kind)
        level = estimate.step_seconds <= margin * winner.step_seconds and request.objective == "time"
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
    """Whether to compile: as requested; on "auto", where a run of `steps` saves twice the time that compiling takes.

    Never on "auto" with kernels fused by hand, nor in a pipeline with split backwards, which needs the graph of the
    backward pass: a compiled one is a single node.
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


#: Parts of a step that are listed even at zero seconds.
ALWAYS_SHOWN = ("compute", "communication", "bubble", "optimizer")


def parts(estimate: Estimate) -> dict[str, float]:
    """The step's seconds by cause."""
    return {name: seconds for name, seconds in estimate.breakdown.items() if seconds or name in ALWAYS_SHOWN}


def _prediction(estimate: Estimate, estimator: Estimator, forecast: RunForecast) -> Prediction:
    workload, seconds = estimator.workload, estimate.step_seconds
    card, cluster = workload.card, workload.cluster
    low, high = time_interval(estimator.profile, workload, estimate.layout)
    flops = 3 * card.forward_flops * workload.global_batch
    speed = workload.global_batch * card.units_per_sample / seconds
    mfu = flops / (seconds * cluster.devices * cluster.device.flops[workload.precision])
    least, most = memory_interval(workload.framework.name, cluster.device.kind)
    intervals = {
        "peak_bytes": (least * estimate.peak_bytes, most * estimate.peak_bytes),
        "tokens_per_second": (speed / high, speed / low),
        "mfu": (mfu / high, mfu / low),
        "goodput": forecast.goodput_interval,
    }
    if forecast.dollars is not None:
        frequent, rare = (forecast.goodput / max(bound, LEAST_USEFUL) for bound in forecast.goodput_interval)
        intervals["dollars"] = (forecast.dollars * low * rare, forecast.dollars * high * frequent)
    return Prediction(
        step_seconds=Interval(low * seconds, seconds, high * seconds),
        peak_bytes=estimate.peak_bytes,
        tokens_per_second=speed,
        mfu=mfu,
        dollars=forecast.dollars,
        goodput=forecast.goodput,
        breakdown=parts(estimate),
        intervals=intervals,
    )


def binding(estimate: Estimate) -> str:
    """The layout's limit: "memory" where it recomputes or offloads, else the largest part of the step."""
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
    """How much slower, and which part of the step grew most; on other numbers of devices, how much dearer."""
    if estimate.layout.devices != winner.layout.devices:
        return _why_dearer(estimate, winner, value)
    extra = estimate.step_seconds - winner.step_seconds
    best = parts(winner)
    growth = {name: seconds - best.get(name, 0.0) for name, seconds in parts(estimate).items()}
    part = max(growth, key=lambda name: growth[name])
    slower = extra / winner.step_seconds
    if extra <= TIE * winner.step_seconds:
        return f"level within {TIE:.0%}, but less simple"
    cause = f"{growth[part]:.3g} s more {part}"
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


def oversized(near_misses: list[OversizedLayout], cluster: Cluster) -> list[RejectedLayout]:
    """Layouts that do not fit, the nearest miss first; of many, one for each (tp, pp, cp, ep)."""
    room = usable_bytes(cluster.device)
    ordered = sorted(near_misses, key=lambda e: (e.peak_bytes, str(e.layout)))
    return [RejectedLayout(one.layout, does_not_fit(one.peak_bytes, room), count) for one, count in _group(ordered)]


def does_not_fit(peak_bytes: int, room: int) -> str:
    needs, misses = peak_bytes / GIB, (peak_bytes - room) / GIB
    return f"does not fit: needs {needs:.1f} GiB a device at best, {misses:.1f} GiB more than there is room for"


Entry = TypeVar("Entry", Estimate, OversizedLayout)


def _group(ordered: list[Entry]) -> list[tuple[Entry, int]]:
    """Entries with the number that each stands for: all of a few; of more, the first of each (tp, pp, cp, ep), and the
    last listed also stands for those left out."""
    if len(ordered) <= MOST_REJECTED:
        return [(one, 1) for one in ordered]
    groups: dict[tuple[int, ...], list[Entry]] = {}
    for one in ordered:
        layout = one.layout
        groups.setdefault((layout.tp, layout.pp, layout.cp, layout.ep), []).append(one)
    firsts = [(entries[0], len(entries)) for entries in groups.values()]
    listed = firsts[:MOST_REJECTED]
    listed[-1] = (listed[-1][0], listed[-1][1] + sum(count for _, count in firsts[MOST_REJECTED:]))
    return listed


def outranked(order: list[Estimate], shown: Sequence[Layout], winner: Estimate, value: Value) -> list[RejectedLayout]:
    """Layouts that fit but are neither the winner nor a runner-up."""
    degrees = attrgetter("dp", "tp", "pp", "cp", "ep")
    shown_degrees = {degrees(layout) for layout in shown}
    lost = [e for e in order if degrees(e.layout) not in shown_degrees]
    best = value(winner)
    return [
        RejectedLayout(estimate.layout, f"fits, and loses by {value(estimate) / best - 1:.0%}", count)
        for estimate, count in _group(lost)
    ]


def rejected_by_rules(space: Space) -> list[RejectedLayout]:
    """Layouts of data parallelism with one other degree that divides the devices, where a rule refuses them."""
    devices = space.workload.cluster.devices
    degrees, names = divisors(devices)[1:], ("tp", "pp", "cp") if space.offers("cp") else ("tp", "pp")
    layouts = [Layout(dp=devices)]
    for degree in degrees:
        layouts += [replace(Layout(dp=devices // degree), **{name: degree}) for name in names]  # type: ignore[arg-type]
    layouts += [Layout(dp=devices, ep=degree) for degree in degrees if space.workload.facts.experts]
    rejected = []
    for layout in (with_micro_batch(space, layout) for layout in layouts):
        if broken := refusals(space.workload.query(layout)):
            rejected.append(RejectedLayout(layout, broken[0].reason))
    return rejected
