"""Groups of different devices as one cluster, and the workload that every way of using them starts from."""

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
from meshwright.plan.reliability import RunForecast, price_of
from meshwright.plan.request import PlanRequest
from meshwright.plan.result import Choice, Share
from meshwright.plan.search import Space
from meshwright.plan.search.search import forecast_of
from meshwright.plan.search.space import NARROW
from meshwright.plan.workload import Workload

MOST_GROUPS = 4


@dataclass(frozen=True)
class MixedCluster:
    """Groups of devices, each a Cluster of one kind, joined by the link `between`.

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
        """The slowest of the groups' networks."""
        return min((group.inter for group in self.groups), key=lambda link: link.bytes_per_second)

    @cached_property
    def slowest(self) -> Cluster:
        """All devices, each with the lowest figures of any."""
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
        by_groups = dict.fromkeys(line for group in self.groups for line in group.assumed)
        return (*by_groups, f"{self.between.bytes_per_second * 8 / 1e9:.3g} Gbit/s a device between the groups")

    def resolve_precision(self, word: str) -> str:
        return self.slowest.resolve_precision(word)

    def __str__(self) -> str:
        return " + ".join(str(group) for group in self.groups)


@dataclass(frozen=True)
class MixedChoice:
    """One way to use the groups: its Choice, and the share of each group."""

    name: str
    choice: Choice
    shares: tuple[Share, ...]

    @property
    def seconds(self) -> float:
        return self.choice.predicted.step_seconds.mid


@dataclass(frozen=True)
class MixedWorkload:
    """The workload on all devices as if each were the slowest, the groups, and the request."""

    workload: Workload
    mixed: MixedCluster
    request: PlanRequest
    profile: Profile | None
    _estimators: dict[str, Estimator] = field(default_factory=dict, repr=False, compare=False)

    def estimator(self, cluster: Cluster, batch: int | None = None) -> Estimator:
        """The estimator of a group for `batch` samples per step (default: all); kept for reuse."""
        workload = self.on(cluster, self.request.global_batch if batch is None else batch)
        if workload.key not in self._estimators:
            self._estimators[workload.key] = Estimator(workload, self.profile)
        return self._estimators[workload.key]

    def space(self, cluster: Cluster, batch: int, pins: Mapping[str, Any]) -> Space:
        return Space(self.on(cluster, batch), pins, NARROW)

    def on(self, cluster: Cluster, batch: int) -> Workload:
        """The workload of one cluster that does `batch` samples of each step."""
        return replace(self.workload, cluster=cluster, global_batch=batch)

    def forecast(self, step_seconds: float) -> RunForecast:
        """Failures, time and cost of the run on all groups; dollars need a price of each kind of device."""
        devices, groups = self.mixed.devices, self.mixed.groups
        cluster = replace(self.mixed.slowest, devices_per_node=max(d for d in divisors(devices) if d <= 8))
        forecast = forecast_of(step_seconds, self.on(cluster, self.request.global_batch), self.request)
        prices = [price_of(group, self.request.spot) for group in groups]
        dollars = None
        if forecast.elapsed_seconds is not None and all(prices):
            hourly = sum(p.dollars_per_hour * g.devices for p, g in zip(prices, groups, strict=True) if p is not None)
            with_spares = 1 + forecast.spare_nodes * cluster.devices_per_node / devices  # at the mean price
            dollars = forecast.elapsed_seconds / 3600 * hourly * with_spares
        return replace(forecast, dollars=dollars)


def mfu(work: MixedWorkload, seconds: float) -> float:
    """Model flops over the peak of all devices, a fraction."""
    peak = sum(group.devices * group.device.flops[work.workload.precision] for group in work.mixed.groups)
    return 3 * work.workload.card.forward_flops * work.request.global_batch / (seconds * peak)
