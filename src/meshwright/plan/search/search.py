"""The plan: what the search found, ranked by time or money among what fits, with what lost and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.divisors import divisors
from meshwright.errors import CannotWork, InputError, Problem, nearest_name
from meshwright.layout import Layout
from meshwright.plan.constants import Profile
from meshwright.plan.cost import Estimate, Estimator
from meshwright.plan.cost.correct import corrected
from meshwright.plan.reliability import LEAST_USEFUL, RunForecast, outlook
from meshwright.plan.request import OBJECTIVES, PlanRequest
from meshwright.plan.result import Choice, Plan
from meshwright.plan.rules import FRAMEWORKS, Framework
from meshwright.plan.search.space import Space, degrees_of
from meshwright.plan.search.suggest import why_no_layout, why_nothing_fits
from meshwright.plan.search.walk import SearchResult, Value, ranked, search, step_seconds
from meshwright.plan.search.what_if import limit, what_ifs
from meshwright.plan.search.wording import choice_of, compiles, outranked, oversized, rejected_by_rules
from meshwright.plan.workload import Workload

RUNNERS_UP = 5
FIELDS = tuple(Layout.__dataclass_fields__)


@dataclass(frozen=True)
class ClusterSearch:
    """One size of the cluster, searched."""

    space: Space
    estimator: Estimator
    found: SearchResult


def make_plan(
    card: Card,
    cluster: Cluster,
    request: PlanRequest,
    profile: Profile | None = None,
    *,
    what_if: bool = True,
    suggest: bool = True,
) -> Plan:
    """The best layout of `card` on `cluster` for `request`, the runners-up, and what was rejected and why; with
    `what_if`, what changes would save; with `suggest`, where none works, the nearest that does.

    Raises InputError for a pin that is no field of the Layout, an unknown framework or objective; CannotWork when the
    pins leave no layout or none fits, naming the nearest that does.
    """
    framework = checked(request)
    precision = cluster.resolve_precision(request.precision)
    workload = Workload(card, cluster, request.global_batch, precision, framework)
    asked = Space(workload, dict(request.pins))
    several = [_searched(asked, profile)]
    if request.objective == "money":
        several += [_searched(asked.changed(cluster=smaller), profile) for smaller in fewer(cluster)]
    whole = several[0]
    working = [one for one in several if one.found.fitting]
    if not working and not whole.found.missing:
        raise CannotWork(why_no_layout(whole.space, request, whole.estimator, suggest))
    if not working:
        raise CannotWork(why_nothing_fits(whole.space, whole.estimator, whole.found.missing, suggest))
    return _plan(working, whole, request, what_if)


def checked(request: PlanRequest) -> Framework:
    """The framework that was named. Raises InputError for it, the objective or a pin where they are unknown."""
    problems = [
        Problem(request.where(f"layout.{name}"), "unknown field of the layout", nearest_name(name, FIELDS))
        for name in request.pins
        if name not in FIELDS
    ]
    if request.objective not in OBJECTIVES:
        known = nearest_name(request.objective, OBJECTIVES)
        problems.append(Problem("command line: --objective", f"unknown objective '{request.objective}'", known))
    if request.framework not in FRAMEWORKS:
        known = nearest_name(request.framework, list(FRAMEWORKS))
        problems.append(Problem("command line: --for", f"unknown framework '{request.framework}'", known))
    if problems:
        raise InputError(problems)
    return FRAMEWORKS[request.framework].planned


def _searched(space: Space, profile: Profile | None) -> ClusterSearch:
    estimator = Estimator(space.workload, profile)
    return ClusterSearch(space, estimator, search(space, estimator))


def fewer(cluster: Cluster) -> list[Cluster]:
    """The same cluster with fewer devices, what one may rent: whole nodes; of a single node its equal parts."""
    if cluster.nodes > 1:
        powers = {2**n for n in range(cluster.nodes.bit_length())}
        nodes = range(1, cluster.nodes) if cluster.nodes <= 16 else sorted(powers | set(divisors(cluster.nodes)))
        return [replace(cluster, devices=n * cluster.devices_per_node) for n in nodes if n < cluster.nodes]
    return [replace(cluster, devices=d, devices_per_node=d) for d in divisors(cluster.devices)[:-1]]


def value_of(request: PlanRequest, space: Space) -> Value:
    """What is made small: seconds of a step, or what a step costs; prices of one cluster are equal, so device-seconds
    rank as dollars do, those of spare nodes and of work that is lost counted in."""
    if request.objective == "time":
        return step_seconds
    cluster = space.workload.cluster

    @cache
    def paid(devices: int, about_seconds: float) -> float:
        part = replace(cluster, devices=devices, devices_per_node=min(devices, cluster.devices_per_node))
        found = forecast_of(about_seconds, space.workload.changed(cluster=part), request)
        return (devices + found.spare_nodes * part.devices_per_node) / max(found.goodput, LEAST_USEFUL)

    def cost(estimate: Estimate) -> float:
        seconds = estimate.step_seconds
        return seconds * paid(estimate.layout.devices, float(f"{seconds:.2g}"))

    return cost


def _plan(working: list[ClusterSearch], whole: ClusterSearch, request: PlanRequest, what_if: bool) -> Plan:
    value = value_of(request, whole.space)
    place: dict[Layout, ClusterSearch] = {estimate.layout: one for one in working for estimate in one.found.fitting}
    order = ranked([corrected(estimate, place[estimate.layout].estimator) for estimate in _fitting(working)], value)
    quickest = min(order, key=value)

    def again(estimate: Estimate) -> Estimate:
        at, layout = place[estimate.layout], estimate.layout
        plain = at.estimator.estimate(layout)
        estimator = at.estimator.compiled if compiles(plain, at.estimator, request) else at.estimator
        return corrected(estimator.estimate(layout, exact=_replayed(plain)), estimator)

    best = ranked([again(estimate) for estimate in _distinct(order)], value, least=value(again(quickest)))
    winner, mine = best[0], place[best[0].layout]
    plain = mine.estimator.estimate(winner.layout)  # what the search compared
    changes = what_ifs(plain, mine.space, mine.estimator, mine.found, value) if what_if else ()
    chances = forecast_of(winner.step_seconds, mine.space.workload, request)
    ways = len({degrees_of(estimate.layout) for estimate in order})
    choices: list[Choice] = []
    for estimate in best:
        at = place[estimate.layout]
        first = None if estimate is winner else winner
        prospects = chances if first is None else forecast_of(estimate.step_seconds, at.space.workload, request)
        choices.append(choice_of(estimate, first, at.estimator, request, ways, prospects, value))
    cluster, found = mine.space.workload.cluster, whole.found
    rejected = (
        *rejected_by_rules(whole.space),
        *oversized(found.missing, cluster),
        *outranked(order, [choice.layout for choice in choices], winner, value),
    )
    return Plan(
        chosen=choices[0],
        runners_up=tuple(choices[1:]),
        rejected=rejected,
        assumed=(*cluster.assumed, *mine.estimator.profile.assumed, *whole.space.workload.framework.assumed),
        model=whole.space.workload.card.name,
        parameters=whole.space.workload.card.parameter_elements,
        cluster=str(cluster),
        device_bytes=cluster.device.memory_bytes,
        global_batch=request.global_batch,
        unit=whole.space.workload.card.unit,
        objective=request.objective,
        framework=request.framework,
        limit=limit(plain, cluster, mine.found, mine.estimator),
        considered=dict(sorted(_total(working + [whole] * (whole not in working)).items())),
        buys=tuple(replace(b, step_seconds=b.step_seconds * winner.step_seconds / plain.step_seconds) for b in changes),
        outlook=chances,
    )


def _fitting(working: list[ClusterSearch]) -> list[Estimate]:
    return [estimate for one in working for estimate in one.found.fitting]


def forecast_of(step_seconds: float, workload: Workload, request: PlanRequest) -> RunForecast:
    """What failures and prices make of a run of such steps."""
    return outlook(
        parameters=workload.card.parameter_elements,
        cluster=workload.cluster,
        step_seconds=step_seconds,
        steps=request.steps,
        spot=request.spot,
        asynchronous=request.asynchronous,
        every=request.checkpoint_every,
        reliability=request.reliability,
    )


def _total(several: list[ClusterSearch]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in several:
        for name, number in one.found.counts.items():
            total[name] = total.get(name, 0) + number
    return total


def _replayed(estimate: Estimate) -> bool:
    """Whether a replay is worth its time: a schedule of many thousand actions is as well served by its formula."""
    return estimate.micro_batches * estimate.layout.pp * estimate.layout.vpp <= 2_000


def _distinct(order: list[Estimate]) -> list[Estimate]:
    """The first, and after it the best of each further set of degrees: runners-up that differ in no more than their
    `shard` say the same thing again and again."""
    shown: dict[tuple[int, ...], Estimate] = {}
    for estimate in order[1:]:
        layout = estimate.layout
        shown.setdefault((layout.dp, layout.tp, layout.pp, layout.cp, layout.ep), estimate)
    return [order[0], *list(shown.values())[:RUNNERS_UP]]
