"""Failures and prices of a run: how often to save, how many spare nodes to keep, and what the run costs.

A run is a renewal process. Devices fail at random, `mtbf` seconds apart on average. Every `interval` seconds of work
the state is copied aside (a stall); it is safe once written, `durable` seconds later, while the work goes on. A failure
throws the run back to the last safe state. Between failures the safe states are at k (interval + stall) + durable, so
the useful work of a life is interval x the sum over k >= 1 of P(life > k (interval + stall) + durable), and a life
costs mtbf x exp(restart / mtbf), including restarts that fail again. With durable = 0 this is
Daly's complete model ("A higher order estimate of the optimum checkpoint interval", 2006); Young (1974) is its first
order.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from meshwright.cluster import Cluster

PRICES_FILE = Path(__file__).with_name("prices.csv")
DAY_SECONDS = 86_400.0
#: fp32 master and two moments, as checkpoints hold them.
STATE_BYTES_PER_PARAMETER = 12
#: The largest share of the time spent on writing checkpoints: storage is shared, and a burst slows everybody.
WRITING_SHARE = 0.1
#: The most work between two checkpoints, where storage can take it: failures are not the only end of a run. People and
#: job queues kill runs too, which no failure rate counts.
MOST_LOST_SECONDS = 180.0
#: With less goodput than this, the time of the run is not worth naming.
LEAST_USEFUL = 1e-3
#: The accepted chance that a failed node finds no spare.
SHORTAGE = 0.01


@dataclass(frozen=True)
class Reliability:
    """How a cluster fails and comes back.

    `failures_per_1000_node_days`: unexpected interruptions (Llama 3, arXiv 2407.21783, table 5: 419 in 54 days of 2,048
    nodes), bounded by `least_failures` and `most_failures` (Kokolis et al. 2024, arXiv 2410.21680: 2.34 and 6.50 in two
    clusters of a company). `spot_per_1000_node_days`: reclaimed nodes on spot, in addition (AWS Spot Instance Advisor,
    May 2025: 10 to 20 % of H100 instances a month). `replaced_share`: failures that remove the node (Llama 3: 78 %
    hardware), for `repair_hours`. `detect_seconds`: to notice a failure and find its cause (MegaScale, arXiv
    2402.15627, states less than ten minutes on average; we see a dead process at once, a silent one by timeout).
    `pause_seconds`: how long a checkpoint stops the work besides copying (all ranks agree, files are opened).
    `start_seconds`: from new processes to the first step, without reading the state. `storage_bytes_per_second`: of one
    node, on busy shared storage (Llama 3: 2 TB/s over 2,048 nodes; BLOOM: 2.3 TB in 40 s from 48 nodes).
    `copy_bytes_per_second`: of one device to its host.
    """

    failures_per_1000_node_days: float = 3.79
    least_failures: float = 2.34
    most_failures: float = 6.5
    spot_per_1000_node_days: float = 5.4
    replaced_share: float = 0.78
    repair_hours: float = 24.0
    detect_seconds: float = 180.0
    pause_seconds: float = 1.0
    start_seconds: float = 240.0
    storage_bytes_per_second: float = 1.0e9
    copy_bytes_per_second: float = 10.0e9


@dataclass(frozen=True)
class Price:
    """Dollars of one device-hour, and how old the figure is ("job" where the job states it)."""

    dollars_per_hour: float
    as_of: str


@dataclass(frozen=True)
class RunForecast:
    """Failures, time and cost of a run of many steps. Shares are of the elapsed time; None means unknown or not asked.

    `goodput` is the share of the elapsed time that ends up in the model; checkpoint stalls, work lost to failures and
    restarts take the rest. `goodput_interval` bounds it by the highest and the lowest published failure rate. `dollars`
    includes the spare nodes. Elapsed time and dollars are also None where goodput is below LEAST_USEFUL.
    """

    mtbf_hours: float
    checkpoint_seconds: float  # of work between two checkpoints
    checkpoint_steps: int
    stall_seconds: float
    durable_seconds: float
    restart_seconds: float
    lost_work_seconds: float  # per failure, on average
    goodput: float
    goodput_interval: tuple[float, float]
    spare_nodes: int
    spot: bool
    failures: float | None  # expected in the run
    elapsed_seconds: float | None
    dollars: float | None
    price: Price | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RunForecast:
        price = None if data["price"] is None else Price(**data["price"])
        bounds = tuple(data.get("goodput_interval", (data["goodput"],) * 2))
        return RunForecast(**{**data, "goodput_interval": bounds, "price": price})

    @property
    def never_ends(self) -> bool:
        """Whether failures come too fast for the run to end."""
        return self.goodput < LEAST_USEFUL


def goodput(
    interval_seconds: float,
    *,
    stall_seconds: float,
    durable_seconds: float,
    restart_seconds: float,
    mtbf_seconds: float,
) -> float:
    """Useful share of a long run's elapsed time, 0 to 1, with a checkpoint after every `interval_seconds` of work."""
    if math.isinf(mtbf_seconds):
        return interval_seconds / (interval_seconds + stall_seconds)
    period = interval_seconds + stall_seconds
    # exp(-(period + durable) / m) / (1 - exp(-period / m)), arranged so that nothing overflows
    safe = math.exp(-(period + durable_seconds) / mtbf_seconds) / -math.expm1(-period / mtbf_seconds)
    return interval_seconds / mtbf_seconds * safe * math.exp(-restart_seconds / mtbf_seconds)


def best_interval(*, stall_seconds: float, durable_seconds: float, mtbf_seconds: float, least_seconds: float) -> float:
    """Seconds of work between checkpoints with the highest goodput, at least `least_seconds`. Infinite where nothing
    ever fails. Raises ValueError unless `stall_seconds` and `least_seconds` are above zero."""
    if stall_seconds <= 0 or least_seconds <= 0:
        raise ValueError("a checkpoint and a step take time")
    if math.isinf(mtbf_seconds):
        return math.inf

    def useful(log_seconds: float) -> float:
        seconds = math.exp(log_seconds)
        parts = {"stall_seconds": stall_seconds, "durable_seconds": durable_seconds, "restart_seconds": 0.0}
        return goodput(seconds, **parts, mtbf_seconds=mtbf_seconds)

    # Goodput has one peak: golden-section search over the logarithm, from the least to far past the mean life.
    low, high = math.log(least_seconds), math.log(max(10 * mtbf_seconds, 2 * least_seconds))
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if useful(left) >= useful(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def spare_nodes(nodes: int, failures_per_second: float, repair_seconds: float, shortage: float = SHORTAGE) -> int:
    """The fewest spares that leave a failed node without one with a chance of at most `shortage`. The number of nodes
    under repair is Poisson with mean `nodes x failures_per_second x repair_seconds`. A single node has no spare."""
    if nodes <= 1:
        return 0
    mean = nodes * failures_per_second * repair_seconds
    term = below = math.exp(-mean) if mean < 700 else 0.0
    if not below:  # exp underflows: the normal curve, 2.33 deviations for 1 %
        return math.ceil(mean + 2.33 * math.sqrt(mean))
    count = 0
    while 1 - below > shortage:
        count += 1
        term *= mean / count
        below += term
    return count


@dataclass(frozen=True)
class CheckpointCost:
    """Seconds of a checkpoint: the work stops for `stall`, the state is safe after `durable` more, a restart from it
    takes `restart`; `least` is the shortest interval that spares shared storage."""

    stall: float
    durable: float
    restart: float
    least: float

    @staticmethod
    def of(state_bytes: float, cluster: Cluster, rates: Reliability, asynchronous: bool) -> CheckpointCost:
        stall = rates.pause_seconds + state_bytes / cluster.devices / rates.copy_bytes_per_second
        durable = state_bytes / cluster.nodes / rates.storage_bytes_per_second
        restart = rates.detect_seconds + rates.start_seconds + durable  # reading takes as long as writing
        write = (stall, durable) if asynchronous else (stall + durable, 0.0)
        return CheckpointCost(*write, restart, durable / WRITING_SHARE)

    def best_steps(self, step_seconds: float, most_seconds: float, mtbf_seconds: float) -> int:
        """Steps between checkpoints with the highest goodput, MOST_LOST_SECONDS at most or what storage takes."""
        least = max(step_seconds, self.least)
        parts = {"stall_seconds": self.stall, "durable_seconds": self.durable, "least_seconds": least}
        seconds = best_interval(**parts, mtbf_seconds=mtbf_seconds)
        seconds = min(seconds, max(least, MOST_LOST_SECONDS), most_seconds)
        return max(1, round(seconds / step_seconds))

    def at_interval(self, seconds: float) -> CheckpointCost:
        """The cost with `seconds` of work between checkpoints: each waits until the one before it is written."""
        return replace(self, stall=max(self.stall, self.durable - seconds))

    def goodput(self, interval_seconds: float, mtbf_seconds: float) -> float:
        parts = {"stall_seconds": self.stall, "durable_seconds": self.durable, "restart_seconds": self.restart}
        return goodput(interval_seconds, **parts, mtbf_seconds=mtbf_seconds)


def run_forecast(
    *,
    parameters: int,
    cluster: Cluster,
    step_seconds: float,
    steps: int = 0,
    spot: bool = False,
    asynchronous: bool = True,
    every: int | None = None,
    reliability: Reliability | None = None,
) -> RunForecast:
    """Failures, time and cost of a run of `steps` steps (0: a long run) of `step_seconds` each.

    `parameters` counts the model's. `asynchronous`: the work goes on while a checkpoint is written. `every` is the
    number of steps between checkpoints: 0 saves only at the end, None takes the best number within MOST_LOST_SECONDS.
    """
    rates = reliability or Reliability()
    reclaimed = rates.spot_per_1000_node_days if spot else 0.0

    def mtbf_at(failures: float) -> float:
        rate = (failures + reclaimed) * cluster.nodes
        return 1000 * DAY_SECONDS / rate if rate else math.inf

    mtbf, total = mtbf_at(rates.failures_per_1000_node_days), steps * step_seconds if steps else math.inf
    checkpoint = CheckpointCost.of(parameters * STATE_BYTES_PER_PARAMETER, cluster, rates, asynchronous)
    if every is None:
        every = checkpoint.best_steps(step_seconds, total, mtbf)
    elif every == 0 or (steps and every > steps):
        every = steps or round(1e15 / step_seconds)
    interval = every * step_seconds
    checkpoint = checkpoint.at_interval(interval)
    useful = checkpoint.goodput(interval, mtbf)
    low, high = (checkpoint.goodput(interval, mtbf_at(rate)) for rate in (rates.most_failures, rates.least_failures))
    spares = spare_nodes(cluster.nodes, rates.replaced_share / mtbf / cluster.nodes, rates.repair_hours * 3600)
    elapsed = total / useful if steps and useful >= LEAST_USEFUL else None
    price = price_of(cluster, spot)
    dollars = None
    if price is not None and elapsed is not None:
        devices = cluster.devices + spares * cluster.devices_per_node
        dollars = elapsed / 3600 * devices * price.dollars_per_hour
    return RunForecast(
        mtbf_hours=min(mtbf / 3600, 1e9),
        checkpoint_seconds=interval,
        checkpoint_steps=every,
        stall_seconds=checkpoint.stall,
        durable_seconds=checkpoint.durable,
        restart_seconds=checkpoint.restart,
        lost_work_seconds=checkpoint.durable + interval / 2,
        goodput=useful,
        goodput_interval=(low, high),
        spare_nodes=spares,
        spot=spot,
        failures=None if elapsed is None else elapsed / mtbf,
        elapsed_seconds=elapsed,
        dollars=dollars,
        price=price,
    )


def price_of(cluster: Cluster, spot: bool = False) -> Price | None:
    """The price of a device-hour: the job's own, else the table's; None where neither has one."""
    if cluster.dollars_per_hour is not None:
        return Price(cluster.dollars_per_hour, "job")
    row = _prices().get(cluster.device.name)
    figure = row["spot" if spot else "on_demand"] if row else ""
    return Price(float(figure), row["as_of"]) if row and figure else None


@cache
def _prices() -> dict[str, dict[str, str]]:
    lines = [line for line in PRICES_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {row["name"]: row for row in csv.DictReader(lines)}
