"""The plan of a cluster with several kinds of device: the stages, or the share of the batch, of each group.

Four ways are compared. One group alone. All groups as if each were the slowest, as a framework does that does not know
kinds. Shares of the batch: each group is data parallel, with as many samples as it can do in the same time, and
gradients are summed between groups once per step. Stages: a pipeline through the groups, its blocks cut so that the
slowest stage is as quick as possible and every stage fits its device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from meshwright.card import Card
from meshwright.cluster import Cluster
from meshwright.divisors import divisors
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.plan.constants import Profile
from meshwright.plan.cost import Estimate
from meshwright.plan.mixed.cluster import MixedChoice, MixedCluster, MixedWorkload, mfu
from meshwright.plan.mixed.pipeline import best_pipeline
from meshwright.plan.reliability import price_of
from meshwright.plan.request import PlanRequest
from meshwright.plan.result import Plan, RejectedLayout, Share
from meshwright.plan.search import make_plan
from meshwright.plan.search.search import requested_framework
from meshwright.plan.search.walk import explore, ranked
from meshwright.plan.search.wording import choice_of
from meshwright.plan.workload import Workload

#: Rounds of moving samples from slower groups to quicker ones, and the number of splits that are balanced in this way.
ROUNDS, BALANCED = 5, 3
#: Gradients between groups are in fp32.
GRADIENT_BYTES = 4


def make_mixed_plan(card: Card, mixed: MixedCluster, request: PlanRequest, profile: Profile | None = None) -> Plan:
    """The best way to use the groups, the others as runners-up, and why. The Plan's `shares` say what each group does.

    Raises CannotWork where no way works, with the reasons of each.
    """
    framework = requested_framework(request)
    precision = mixed.resolve_precision(request.precision)
    slowest = Workload(card, mixed.slowest, request.global_batch, precision, framework)
    work = MixedWorkload(slowest, mixed, request, profile)
    ways: list[MixedChoice] = []
    problems: list[Problem] = []
    rejected: list[RejectedLayout] = []
    plans: list[Plan] = []
    for group in (*mixed.groups, mixed.slowest):
        try:
            plan = make_plan(card, group, replace(request, objective="time"), profile, what_if=False)
        except CannotWork as error:
            if group is mixed.slowest and not all("does not fit" in p.what for p in error.problems):
                problems = []  # the rules refuse all devices together: the reasons of the groups would repeat that
            problems += [replace(p, what=f"{group}: {p.what}") for p in error.problems]
            continue
        plans.append(plan)
        ways.append(_uniform(work, group, plan))
        rejected += plan.rejected
    ways += [way for way in (best_batch_split(work), best_pipeline(work)) if way is not None]
    if not ways:
        raise CannotWork(problems)
    if request.objective == "money":
        price = _prices(work)
        order = sorted(ways, key=lambda way: (price(way), way.name))
    else:
        order = sorted(ways, key=lambda way: (way.seconds, way.name))
    best = order[0]
    plan_of_best = next((plan for plan in plans if plan.chosen is best.choice), None)
    return Plan(
        chosen=replace(best.choice, why=_why(best, order)),
        runners_up=tuple(replace(way.choice, why=_why_lost(way, best)) for way in order[1:]),
        rejected=tuple(dict.fromkeys(rejected)),
        assumed=(*mixed.assumed, *work.estimator(mixed.slowest).profile.assumed, *framework.assumed),
        model=card.name,
        parameters=card.parameter_elements,
        cluster=str(mixed),
        device_bytes=min(group.device.memory_bytes for group in mixed.groups),
        global_batch=request.global_batch,
        unit=card.unit,
        objective=request.objective,
        framework=framework.name,
        limit=plan_of_best.limit if plan_of_best else f"{best.name}: {best.choice.binding}",
        outlook=plan_of_best.outlook if plan_of_best else work.forecast(best.seconds),
        shares=best.shares,
    )


def _why(best: MixedChoice, order: list[MixedChoice]) -> str:
    others = [f"{way.name}: {way.seconds / best.seconds:.2f} times as long" for way in order[1:]]
    return f"{best.name}: {best.choice.why}" + (f"; beside {'; '.join(others)}" if others else "")


def _why_lost(way: MixedChoice, best: MixedChoice) -> str:
    if way.seconds < best.seconds:
        return f"{way.name}: {1 - way.seconds / best.seconds:.0%} quicker, and dearer"
    return f"{way.name}: {way.seconds / best.seconds - 1:.0%} slower"


def _prices(work: MixedWorkload) -> Callable[[MixedChoice], float]:
    """The cost of a way's step, without the devices that stand idle. Raises InputError where a device has no known
    price: the seconds of different kinds do not compare as money."""
    hourly = {}
    for group in work.mixed.groups:
        price = price_of(group, work.request.spot)
        if price is None:
            what = f"no price of {group.device.name} is known"
            raise InputError(Problem("command line: --objective", what, "plan for time, or with devices that have one"))
        hourly[group.device.name] = price.dollars_per_hour
    return lambda way: way.seconds * sum(s.devices * hourly[s.group] for s in way.shares if s.samples)


def _uniform(work: MixedWorkload, cluster: Cluster, plan: Plan) -> MixedChoice:
    """One group alone, or all of them as the slowest: an ordinary plan."""
    layout, batch = plan.chosen.layout, work.request.global_batch
    alone = cluster in work.mixed.groups
    shares = []
    for group in work.mixed.groups:
        busy = group == cluster or not alone
        share = batch * group.devices // cluster.devices if not alone and layout.pp == 1 else batch
        why = "stands idle: the other group is quicker alone" if not busy else "as if all were the slowest"
        shares.append(
            Share(
                group=group.device.name,
                devices=group.devices,
                first_stage=0,
                stop_stage=layout.pp if busy else 0,
                samples=share if busy else 0,
                micro_batch=layout.micro_batch,
                peak_bytes=plan.chosen.predicted.peak_bytes if busy else 0,
                why="all of the work" if alone and busy else why,
            )
        )
    name = f"only {cluster.device.name}" if alone else "all as the slowest"
    return MixedChoice(name, plan.chosen, tuple(shares))


def best_batch_split(work: MixedWorkload) -> MixedChoice | None:
    """Each group data parallel, with a share of the batch by its throughput; None where no shares work."""
    groups, pins = work.mixed.groups, work.request.pins
    if any(pins.get(name, 1) != 1 for name in ("cp", "ep")) or "dp" in pins or "shard" in pins:
        return None  # such a pin counts all ranks, not those of each kind
    splits = []
    most = min(group.devices_per_node for group in groups)
    sizes = work.workload.facts.tensor_parallel_sizes(most, work.workload.framework)
    for tp in [pins["tp"]] if "tp" in pins else sizes:
        for pp in [pins["pp"]] if "pp" in pins else divisors(min(group.devices for group in groups)):
            if pp <= len(work.workload.card.blocks) and all(group.devices % (tp * pp) == 0 for group in groups):
                memory = [group.devices * group.device.memory_bytes for group in groups]
                samples = _divide_batch(work, tp * pp, memory)
                split = None if samples is None else _BatchSplit.of(work, tp, pp, samples)
                splits += [split] if split is not None else []
    splits.sort(key=lambda split: (split.seconds, split.pp, split.tp))
    balanced = [split.balanced() for split in splits[:BALANCED]]
    return min(balanced, key=lambda split: split.seconds).way() if balanced else None


def _divide_batch(work: MixedWorkload, ranks: int, weights: Sequence[float]) -> tuple[int, ...] | None:
    """Samples of each group in proportion to `weights`, each a multiple of its data-parallel ranks; None where the
    batch cannot be divided in this way."""
    groups, batch = work.mixed.groups, work.request.global_batch
    steps = [group.devices // ranks for group in groups]
    order = sorted(range(len(groups)), key=lambda g: -steps[g])

    def fill(place: int, left: int) -> list[int] | None:
        g = order[place]
        if place == len(order) - 1:
            return [left] if left > 0 and left % steps[g] == 0 else None
        ideal = batch * weights[g] / sum(weights)
        near = sorted(range(steps[g], left, steps[g]), key=lambda samples: (abs(samples - ideal), samples))
        for samples in near[:16]:
            if (rest := fill(place + 1, left - samples)) is not None:
                return [samples, *rest]
        return None

    samples_by_place = fill(0, batch)
    return None if samples_by_place is None else tuple(samples_by_place[order.index(g)] for g in range(len(groups)))


@dataclass(frozen=True)
class _BatchSplit:
    """The samples of each group; all groups have the same tp and pp."""

    work: MixedWorkload
    tp: int
    pp: int
    samples: tuple[int, ...]
    estimates: tuple[Estimate, ...]

    @staticmethod
    def of(work: MixedWorkload, tp: int, pp: int, samples: tuple[int, ...]) -> _BatchSplit | None:
        estimates = []
        pins = {**work.request.pins, "tp": tp, "pp": pp, "cp": 1, "ep": 1}
        for group, share in zip(work.mixed.groups, samples, strict=True):
            space = work.space(group, share, pins)
            fitting = explore(space, work.estimator(group, share), cutoff=1.05).fitting
            if not fitting:
                return None
            estimates.append(ranked(fitting)[0])
        return _BatchSplit(work, tp, pp, samples, tuple(estimates))

    @property
    def between_seconds(self) -> float:
        """Seconds to sum gradients between the groups, in a ring with one rank of each."""
        link, groups = self.work.mixed.between, len(self.samples)
        shard = min(estimate.layout.shard for estimate in self.estimates)
        size = self.work.workload.card.parameter_elements / (self.tp * self.pp) / shard * GRADIENT_BYTES
        return 2 * (groups - 1) * (link.latency_seconds + size / groups / link.bytes_per_second)

    @property
    def seconds(self) -> float:
        return max(estimate.step_seconds for estimate in self.estimates) + self.between_seconds

    def balanced(self) -> _BatchSplit:
        """The best split after moving samples to quicker groups, for a few rounds."""
        best = now = self
        for _ in range(ROUNDS):
            speeds = [n / e.step_seconds for n, e in zip(now.samples, now.estimates, strict=True)]
            samples = _divide_batch(self.work, self.tp * self.pp, speeds)
            if samples is None or samples == now.samples:
                break
            after = _BatchSplit.of(self.work, self.tp, self.pp, samples)
            if after is None:
                break
            now = after
            best = min(best, now, key=lambda split: split.seconds)
        return best

    def way(self) -> MixedChoice:
        work, request, seconds = self.work, self.work.request, self.seconds
        estimate = max(self.estimates, key=lambda estimate: estimate.step_seconds)
        whole = replace(
            estimate,
            layout=replace(
                estimate.layout,
                dp=sum(e.layout.dp for e in self.estimates),
                shard=min(e.layout.shard for e in self.estimates),
            ),
            step_seconds=seconds,
            communication_seconds=estimate.communication_seconds + self.between_seconds,
        )
        choice = choice_of(whole, None, work.estimator(work.mixed.slowest), request, 1, work.forecast(seconds))
        peak = max(e.peak_bytes for e in self.estimates)
        predicted = choice.predicted.with_figures(peak_bytes=peak, mfu=mfu(work, seconds))
        why = ", ".join(
            f"{n} samples to {g.device.name} ({n / request.global_batch:.0%} for {g.devices / work.mixed.devices:.0%} "
            f"of the devices)"
            for n, g in zip(self.samples, work.mixed.groups, strict=True)
        )
        return MixedChoice("shares of the batch", replace(choice, predicted=predicted, why=why), self._shares())

    def _shares(self) -> tuple[Share, ...]:
        shares = []
        for group, samples, estimate in zip(self.work.mixed.groups, self.samples, self.estimates, strict=True):
            busy = estimate.step_seconds / max(e.step_seconds for e in self.estimates)
            why = f"{samples} samples take it {estimate.step_seconds:.3g} s with {estimate.layout}; busy {busy:.0%}"
            shares.append(
                Share(
                    group=group.device.name,
                    devices=group.devices,
                    first_stage=0,
                    stop_stage=self.pp,
                    samples=samples,
                    micro_batch=estimate.layout.micro_batch,
                    peak_bytes=estimate.peak_bytes,
                    why=why,
                )
            )
        return tuple(shares)
