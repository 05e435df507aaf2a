"""Groups of different devices as one cluster, and what every way of using them works from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from meshwright.cluster import Cluster, Device, Link
from meshwright.divisors import divisors
from meshwright.errors import InputError, Problem
from meshwright.plan.constants import Profile
from meshwright.plan.cost import Estimator
from meshwright.plan.reliability import RunForecast, outlook, price_of
from meshwright.plan.request import PlanRequest
from meshwright.plan.result import Choice, Share
from meshwright.plan.search import Space
from meshwright.plan.search.space import NARROW
from meshwright.plan.workload import Workload

MOST_GROUPS = 4


@dataclass(frozen=True)
class MixedCluster:
    """Groups of devices, each a Cluster of one kind; `between` joins them.

    Raises InputError for fewer than two groups or more than MOST_GROUPS.
    """

    groups: tuple[Cluster, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.groups) <= MOST_GROUPS:
            what = f"{len(self.groups)} groups of devices"
            raise InputError(Problem("cluster.groups", what, f"give 2 to {MOST_GROUPS}; one kind is cluster.named"))

    @property
    def devices(self) -> int:
        return sum(group.devices for group in self.groups)

    @property
    def between(self) -> Link:
        """The slowest network of the groups: what they can all be joined by."""
        return min((group.inter for group in self.groups), key=lambda link: link.bytes_per_second)

    @cached_property
    def slowest(self) -> Cluster:
        """All devices as if each were the least of all in everything."""
        devices = [group.device for group in self.groups]
        shared = set.intersection(*(set(device.flops) for device in devices))
        base = min(devices, key=lambda device: max(device.flops[p] for p in shared))
        real = {p: min(d.real_flops[p] for d in devices) for p in shared if all(p in d.real_flops for d in devices)}
        least: dict[str, Any] = {
            "name": "the slowest of " + ", ".join(device.name for device in devices),
            "memory_bytes": min(device.memory_bytes for device in devices),
            "flops": {precision: min(d.flops[precision] for d in devices) for precision in sorted(shared)},
            "memory_bytes_per_second": min(device.memory_bytes_per_second for device in devices),
            "launch_seconds": max(device.launch_seconds for device in devices),
            "real_flops": real,
            "real_memory_bytes_per_second": min(device.real_memory_bytes_per_second for device in devices),
        }
        per_node = [d for d in divisors(self.devices) if all(group.devices_per_node % d == 0 for group in self.groups)]
        intra = min((group.intra for group in self.groups), key=lambda link: link.bytes_per_second)
        device: Device = replace(base, **least)
        return Cluster(device, self.devices, per_node[-1], intra, self.between, assumed=self.assumed)

    @property
    def assumed(self) -> tuple[str, ...]:
        said = dict.fromkeys(line for group in self.groups for line in group.assumed)
        return (*said, f"{self.between.bytes_per_second * 8 / 1e9:.3g} Gbit/s a device between the groups")

    def resolve_precision(self, word: str) -> str:
        return self.slowest.resolve_precision(word)

    def __str__(self) -> str:
        return " + ".join(str(group) for group in self.groups)


@dataclass(frozen=True)
class MixedChoice:
    """One way to use the groups: its step, what each group does, and the Choice that says it."""

    name: str
    choice: Choice
    shares: tuple[Share, ...]

    @property
    def seconds(self) -> float:
        return self.choice.predicted.step_seconds.mid


@dataclass(frozen=True)
class MixedWorkload:
    """What every way works from: the workload on all devices as if each were the slowest, the groups, the request."""

    workload: Workload
    mixed: MixedCluster
    request: PlanRequest
    profile: Profile | None
    _estimators: dict[str, Estimator] = field(default_factory=dict, repr=False, compare=False)

    def estimator(self, cluster: Cluster, batch: int | None = None) -> Estimator:
        """The estimator of a group, remembered with all that it has computed."""
        workload = self.on(cluster, self.request.global_batch if batch is None else batch)
        if workload.key not in self._estimators:
            self._estimators[workload.key] = Estimator(workload, self.profile)
        return self._estimators[workload.key]

    def space(self, cluster: Cluster, batch: int, pins: Mapping[str, Any]) -> Space:
        return Space(self.on(cluster, batch), pins, NARROW)

    def on(self, cluster: Cluster, batch: int) -> Workload:
        """The part of the work that a cluster does: `batch` samples of each step."""
        return self.workload.changed(cluster=cluster, global_batch=batch)

    def chances(self, step_seconds: float, groups: tuple[Cluster, ...]) -> RunForecast:
        """What failures make of it, with the dollars of every device where all have a price."""
        devices = sum(group.devices for group in groups)
        cluster = replace(self.mixed.slowest, devices=devices, devices_per_node=1)
        cluster = replace(cluster, devices_per_node=max(d for d in divisors(devices) if d <= 8))
        found = outlook(
            parameters=self.workload.card.parameter_elements, cluster=cluster, step_seconds=step_seconds,
            steps=self.request.steps, spot=self.request.spot, asynchronous=self.request.asynchronous,
            every=self.request.checkpoint_every, reliability=self.request.reliability,
        )  # fmt: skip
        prices = [price_of(group, self.request.spot) for group in groups]
        dollars = None
        if found.elapsed_seconds is not None and all(prices):
            hourly = sum(p.dollars_per_hour * g.devices for p, g in zip(prices, groups, strict=True) if p is not None)
            paid = 1 + found.spare_nodes * cluster.devices_per_node / devices  # spares, at the mean price
            dollars = found.elapsed_seconds / 3600 * hourly * paid
        return replace(found, dollars=dollars)


def mfu(work: MixedWorkload, seconds: float) -> float:
    """Share of the peak of all devices together."""
    peak = sum(group.devices * group.device.flops[work.workload.precision] for group in work.mixed.groups)
    return 3 * work.workload.card.forward_flops * work.request.global_batch / (seconds * peak)
