"""The plan: the layouts that fit, ranked by time or money, and why the others lost."""

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
from meshwright.plan.reliability import LEAST_USEFUL, RunForecast, run_forecast
from meshwright.plan.request import OBJECTIVES, PlanRequest
from meshwright.plan.result import Plan
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
    """The search on a cluster of one size."""

    space: Space
    estimator: Estimator
    result: SearchResult


def make_plan(
    card: Card,
    cluster: Cluster,
    request: PlanRequest,
    profile: Profile | None = None,
    *,
    what_if: bool = True,
    suggest: bool = True,
) -> Plan:
    """The best layout of `card` on `cluster` for `request`, the runners-up, and the rejected layouts with reasons; with
    `what_if`, what changes would save.

    Raises InputError for a pin that is no field of the Layout, an unknown framework or objective; CannotWork when the
    pins leave no layout or none fits, with `suggest` naming the nearest that does.
    """
    framework = requested_framework(request)
    precision = cluster.resolve_precision(request.precision)
    workload = Workload(card, cluster, request.global_batch, precision, framework, request.asynchronous)
    space = Space(workload, dict(request.pins))
    whole = _search_cluster(space, profile)
    searches = [whole]
    if request.objective == "money":
        searches += [_search_cluster(space.with_workload(cluster=part), profile) for part in smaller_clusters(cluster)]
    working = [one for one in searches if one.result.fitting]
    if not working and not whole.result.near_misses:
        raise CannotWork(why_no_layout(space, request, whole.estimator, suggest))
    if not working:
        raise CannotWork(why_nothing_fits(space, whole.estimator, whole.result.near_misses, suggest))
    return _plan(working, whole, request, what_if)


def requested_framework(request: PlanRequest) -> Framework:
    """The framework that the request names. Raises InputError for an unknown framework, objective or pin."""
    problems = [
        Problem(request.where(f"layout.{name}"), "unknown field of the layout", nearest_name(name, FIELDS))
        for name in request.pins
        if name not in FIELDS
    ]
    if request.objective not in OBJECTIVES:
        nearest = nearest_name(request.objective, OBJECTIVES)
        problems.append(Problem("command line: --objective", f"unknown objective '{request.objective}'", nearest))
    if request.framework not in FRAMEWORKS:
        nearest = nearest_name(request.framework, list(FRAMEWORKS))
        problems.append(Problem("command line: --for", f"unknown framework '{request.framework}'", nearest))
    if problems:
        raise InputError(problems)
    return FRAMEWORKS[request.framework].planned


def _search_cluster(space: Space, profile: Profile | None) -> ClusterSearch:
    estimator = Estimator(space.workload, profile)
    return ClusterSearch(space, estimator, search(space, estimator))


def smaller_clusters(cluster: Cluster) -> list[Cluster]:
    """The same cluster with fewer devices: fewer whole nodes, or an equal part of a single node."""
    if cluster.nodes > 1:
        powers = {2**n for n in range(cluster.nodes.bit_length())}
        nodes = range(1, cluster.nodes) if cluster.nodes <= 16 else sorted(powers | set(divisors(cluster.nodes)))
        return [replace(cluster, devices=n * cluster.devices_per_node) for n in nodes if n < cluster.nodes]
    return [replace(cluster, devices=d, devices_per_node=d) for d in divisors(cluster.devices)[:-1]]


def objective_function(request: PlanRequest, space: Space) -> Value:
    """What the plan minimises: seconds of a step, or its cost. All devices of a cluster have one price, so
    device-seconds rank as dollars do; they include spare nodes and lost work."""
    if request.objective == "time":
        return step_seconds
    cluster = space.workload.cluster

    @cache
    def devices_paid(devices: int, about_seconds: float) -> float:
        part = replace(cluster, devices=devices, devices_per_node=min(devices, cluster.devices_per_node))
        forecast = forecast_of(about_seconds, replace(space.workload, cluster=part), request)
        return (devices + forecast.spare_nodes * part.devices_per_node) / max(forecast.goodput, LEAST_USEFUL)

    def cost(estimate: Estimate) -> float:
        seconds = estimate.step_seconds
        return seconds * devices_paid(estimate.layout.devices, float(f"{seconds:.2g}"))

    return cost


def _plan(working: list[ClusterSearch], whole: ClusterSearch, request: PlanRequest, what_if: bool) -> Plan:
    value = objective_function(request, whole.space)
    fitting = {estimate.layout: (estimate, one) for one in working for estimate in one.result.fitting}
    order = ranked([corrected(estimate, one.estimator) for estimate, one in fitting.values()], value)
    quickest = min(order, key=value)

    def final_estimate(layout: Layout) -> Estimate:
        """As `train` would run it: compiled where that pays, corrected, the schedule replayed where that is quick."""
        estimator = fitting[layout][1].estimator
        plain = estimator.estimate(layout)
        if compiles(plain, estimator, request):
            estimator = estimator.compiled
        return corrected(estimator.estimate(layout, exact=_is_quick_to_replay(plain)), estimator)

    finalists = [final_estimate(estimate.layout) for estimate in _distinct(order)]
    best = ranked(finalists, value, least=value(final_estimate(quickest.layout)))
    winner, home = best[0], fitting[best[0].layout][1]
    plain = home.estimator.estimate(winner.layout)  # as the search compared it
    changes = what_ifs(plain, home.space, home.estimator, home.result, value) if what_if else ()
    forecast = forecast_of(winner.step_seconds, home.space.workload, request)
    considered = len({degrees_of(estimate.layout) for estimate in order})
    choices = [choice_of(winner, None, home.estimator, request, considered, forecast, value)]
    for estimate in best[1:]:
        one = fitting[estimate.layout][1]
        its_forecast = forecast_of(estimate.step_seconds, one.space.workload, request)
        choices.append(choice_of(estimate, winner, one.estimator, request, considered, its_forecast, value))
    cluster = home.space.workload.cluster
    rejected = (
        *rejected_by_rules(whole.space),
        *oversized(whole.result.near_misses, cluster),
        *outranked(order, [choice.layout for choice in choices], winner, value),
    )
    return Plan(
        chosen=choices[0],
        runners_up=tuple(choices[1:]),
        rejected=rejected,
        assumed=(*cluster.assumed, *home.estimator.profile.assumed, *whole.space.workload.framework.assumed),
        model=whole.space.workload.card.name,
        parameters=whole.space.workload.card.parameter_elements,
        cluster=str(cluster),
        device_bytes=cluster.device.memory_bytes,
        global_batch=request.global_batch,
        unit=whole.space.workload.card.unit,
        objective=request.objective,
        framework=request.framework,
        limit=limit(plain, cluster, home.result, home.estimator),
        considered=dict(sorted(_total_counts(working + [whole] * (whole not in working)).items())),
        buys=tuple(replace(b, step_seconds=b.step_seconds * winner.step_seconds / plain.step_seconds) for b in changes),
        outlook=forecast,
    )


def forecast_of(step_seconds: float, workload: Workload, request: PlanRequest) -> RunForecast:
    """Failures, time and cost of a run of such steps."""
    return run_forecast(
        parameters=workload.card.parameter_elements,
        cluster=workload.cluster,
        step_seconds=step_seconds,
        steps=request.steps,
        spot=request.spot,
        asynchronous=request.asynchronous,
        every=request.checkpoint_every,
        reliability=request.reliability,
    )


def _total_counts(searches: list[ClusterSearch]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in searches:
        for name, number in one.result.counts.items():
            total[name] = total.get(name, 0) + number
    return total


def _is_quick_to_replay(estimate: Estimate) -> bool:
    """Whether to replay the schedule; for thousands of actions the closed form is as good."""
    return estimate.micro_batches * estimate.layout.pp * estimate.layout.vpp <= 2_000


def _distinct(order: list[Estimate]) -> list[Estimate]:
    """The first, then the best of each other set of degrees: runners-up that differ only in `shard` say little."""
    shown: dict[tuple[int, ...], Estimate] = {}
    for estimate in order[1:]:
        layout = estimate.layout
        shown.setdefault((layout.dp, layout.tp, layout.pp, layout.cp, layout.ep), estimate)
    return [order[0], *list(shown.values())[:RUNNERS_UP]]
