"""The search: every layout that the rules allow and the pins leave, ranked by predicted time among those that fit."""

from __future__ import annotations

import shutil

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.errors import CannotWork, InputError, Problem, nearest_name
from meshwright.layout import RECOMPUTE, Layout
from meshwright.plan.estimate import Estimate, Estimator
from meshwright.plan.memory import usable_bytes
from meshwright.plan.nearest import why_no_layout, why_nothing_fits
from meshwright.plan.result import Choice, Interval, Plan, PlanRequest, Prediction, Rejected
from meshwright.plan.rules import Facts, divisors, refusals
from meshwright.plan.space import TIE, Space, estimate_all, ranked, with_micro

GIB = 1024**3
RUNNERS_UP = 5
FIELDS = tuple(Layout.__dataclass_fields__)
#: The 90 % interval around an uncalibrated prediction, as factors of its middle.
INTERVAL = {"cpu": (0.5, 2.0), "cuda": (0.75, 1.5)}
#: torch.compile: the share of the computing that it saves, and what the first step takes longer. The CPU's share is
#: from bench/train.py (docs/benchmarks.md); the GPU's was never measured by us.
COMPILE_SAVES = {"cpu": 0.05, "cuda": 0.2}
COMPILE_SECONDS = 60.0


def make_plan(card: Card, cluster: Cluster, request: PlanRequest) -> Plan:
    """The best layout of `card` on `cluster` for `request`, the runners-up, and what was rejected and why.

    Raises InputError for a pin that is no field of the Layout; CannotWork when the pins leave no layout or none fits,
    naming the nearest that does.
    """
    problems = [
        Problem(request.where(f"layout.{name}"), "unknown field of the layout", nearest_name(name, FIELDS))
        for name in request.pins
        if name not in FIELDS
    ]
    if problems:
        raise InputError(problems)
    precision = cluster.resolve_precision(request.precision)
    space = Space(card, Facts.of(card), cluster, request.global_batch, dict(request.pins))
    estimator = Estimator(card, cluster, request.global_batch, precision)
    fitting, missing = estimate_all(space, estimator)
    if not fitting and not missing:
        raise CannotWork(why_no_layout(space, request))
    if not fitting:
        raise CannotWork(why_nothing_fits(space, request, estimator, missing))
    best = ranked([estimator.estimate(e.layout, exact=_replayed(e)) for e in _varied(ranked(fitting))])
    winner = _choice(best[0], None, space, request, precision, len(fitting))
    losers = tuple(_choice(estimate, best[0], space, request, precision, len(fitting)) for estimate in best[1:])
    rejected = (*_rejected_by_rule(space), *_rejected_by_memory(missing, cluster))
    assumed = (*cluster.assumed, "speeds from data sheets: nothing was measured on these devices yet")
    return Plan(
        chosen=winner,
        runners_up=losers,
        rejected=rejected,
        assumed=assumed,
        model=card.name,
        parameters=card.parameter_elements,
        cluster=str(cluster),
        device_bytes=cluster.device.memory_bytes,
        global_batch=request.global_batch,
        unit=card.unit,
    )


def _replayed(estimate: Estimate) -> bool:
    """Whether a replay is worth its time: a schedule of many thousand actions is as well served by its formula."""
    return estimate.micro_batches * estimate.layout.pp <= 20_000


def _does_not_fit(estimate: Estimate, room: int) -> str:
    needs, misses = estimate.peak_bytes / GIB, (estimate.peak_bytes - room) / GIB
    return f"does not fit: needs {needs:.1f} GiB a device at best, {misses:.1f} GiB more than there is room for"


def _varied(order: list[Estimate]) -> list[Estimate]:
    """The first, and after it the best of each further (dp, tp, pp): runners-up that differ in no more than their
    `shard` say the same thing again and again."""
    shown: dict[tuple[int, ...], Estimate] = {}
    for estimate in order[1:]:
        layout = estimate.layout
        shown.setdefault((layout.dp, layout.tp, layout.pp), estimate)
    return [order[0], *list(shown.values())[:RUNNERS_UP]]


def _choice(
    estimate: Estimate, winner: Estimate | None, space: Space, request: PlanRequest, precision: str, considered: int
) -> Choice:
    """A Choice from an estimate; `winner` is None for the winner itself."""
    names = [block.name for block in space.card.blocks]
    edges = zip(estimate.first_blocks, (*estimate.first_blocks[1:], len(names)), strict=True)
    if winner is None:
        why = _why_best(estimate, space, considered)
    else:
        why = _why_lost(estimate, winner)
    return Choice(
        layout=estimate.layout,
        precision=precision,
        compiled=_compiled(estimate, space.cluster.device.kind, request),
        micro_batches=estimate.micro_batches,
        stages=tuple(tuple(names[start:stop]) for start, stop in edges),
        predicted=_prediction(estimate, space, request, precision),
        memory=estimate.memory,
        forward_seconds=estimate.forward_seconds,
        backward_seconds=estimate.backward_seconds,
        transfer_seconds=estimate.transfer_seconds,
        binding=_binding(estimate),
        why=why,
    )


def _compiled(estimate: Estimate, kind: str, request: PlanRequest) -> bool:
    """As asked; on "auto" where the run is long enough to earn back twice the time that compiling takes."""
    if request.compile != "auto":
        return bool(request.compile)
    if kind == "cpu" and not shutil.which("g++"):  # inductor builds C++ there
        return False
    return request.steps * estimate.compute_seconds * COMPILE_SAVES[kind] > 2 * COMPILE_SECONDS


def _parts(estimate: Estimate) -> dict[str, float]:
    return {
        "compute": estimate.compute_seconds,
        "communication": estimate.communication_seconds,
        "bubble": estimate.bubble_seconds,
        "optimizer": estimate.optimizer_seconds,
    }


def _prediction(estimate: Estimate, space: Space, request: PlanRequest, precision: str) -> Prediction:
    device, seconds = space.cluster.device, estimate.step_seconds
    low, high = INTERVAL[device.kind]
    flops = 3 * space.card.forward_flops * space.global_batch
    price = space.cluster.dollars_per_hour
    dollars = None
    if price is not None and request.steps > 0:
        dollars = request.steps * seconds / 3600 * space.cluster.devices * price
    return Prediction(
        step_seconds=Interval(low * seconds, seconds, high * seconds),
        peak_bytes=estimate.peak_bytes,
        tokens_per_second=space.global_batch * space.card.units_per_sample / seconds,
        mfu=flops / (seconds * space.cluster.devices * device.flops[precision]),
        dollars=dollars,
        goodput=None,  # failures are not modelled yet
        breakdown=_parts(estimate),
    )


def _binding(estimate: Estimate) -> str:
    """What holds the layout back: memory where it had to recompute, else the largest part of the step."""
    if estimate.layout.recompute != "none":
        return "memory"
    parts = _parts(estimate)
    return max(parts, key=lambda name: parts[name])


def _why_best(estimate: Estimate, space: Space, considered: int) -> str:
    device = space.cluster.device
    free = device.memory_bytes - estimate.peak_bytes
    shares = {name: seconds / estimate.step_seconds for name, seconds in _parts(estimate).items()}
    share = ", ".join(f"{value:.0%} {name}" for name, value in shares.items() if value >= 0.005)
    among = "the only layout that fits" if considered == 1 else f"the fastest of {considered} ways to split that fit"
    return f"{among}: {share}; {free / GIB:.1f} GiB of {device.memory_bytes / GIB:.1f} stay free on the fullest device"


def _why_lost(estimate: Estimate, winner: Estimate) -> str:
    """How much slower, and which part of the step grew most."""
    extra = estimate.step_seconds - winner.step_seconds
    mine, best = _parts(estimate), _parts(winner)
    grew = max(mine, key=lambda name: mine[name] - best[name])
    slower = extra / winner.step_seconds
    if extra <= TIE * winner.step_seconds:
        return f"level within {TIE:.0%}, but less simple"
    cause = f"{mine[grew] - best[grew]:.3g} s more {grew}"
    if RECOMPUTE.index(estimate.layout.recompute) > RECOMPUTE.index(winner.layout.recompute):
        cause += f", and fits only with recompute={estimate.layout.recompute}"
    return f"{slower:.0%} slower: {cause}"


def _rejected_by_memory(missing: list[Estimate], cluster: Cluster) -> list[Rejected]:
    room = usable_bytes(cluster.device)
    ordered = sorted(missing, key=lambda e: (e.peak_bytes, str(e.layout)))
    return [Rejected(e.layout, _does_not_fit(e, room)) for e in ordered]


def _rejected_by_rule(space: Space) -> list[Rejected]:
    """Degrees that divide the devices, one at a time beside data parallelism, and the rule that refuses each."""
    lost: list[Rejected] = []
    devices = space.cluster.devices
    tried = [Layout(dp=devices)]
    for degree in (d for d in divisors(devices) if d > 1):
        tried += [Layout(dp=devices // degree, tp=degree), Layout(dp=devices // degree, pp=degree)]
    for layout in tried:
        layout = with_micro(space, layout)
        broken = refusals(space.question(layout))
        if broken:
            lost.append(Rejected(layout, broken[0].reason))
    return lost
