"""What failures and money make of a plan: how often to save, how many nodes to keep spare, what the run will cost.

A run is a renewal process. Devices fail at random, `mtbf` seconds apart on average. Every `interval` seconds of work
the state is copied aside (a stall), and is safe once it has been written (`durable` seconds later, while the work goes
on). A failure throws the run back to the last state that was safe. Between failures the safe states are at k (interval
+ stall) + durable, so the useful work of a life is interval x the sum over k >= 1 of P(life > k (interval + stall) +
durable), and a life costs mtbf x exp(restart / mtbf), restarts that fail again included. With durable = 0 this is
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
#: Checkpoints are written in at most this share of the time: storage is shared, and a burst slows everybody.
WRITING_SHARE = 0.1
#: Goodput below which a run does not end in any time worth naming.
LEAST_USEFUL = 1e-3
#: Chance that is left of finding no spare when a node fails.
SHORTAGE = 0.01


@dataclass(frozen=True)
class Reliability:
    """How a cluster fails and comes back.

    `failures_per_1000_node_days`: unexpected interruptions (Llama 3, arXiv 2407.21783, table 5: 419 in 54 days of 2,048
    nodes); between `least_failures` and `most_failures` they may be (Kokolis et al. 2024, arXiv 2410.21680: 2.34 and
    6.50 in two clusters of a company). `spot_per_1000_node_days`: what being reclaimed adds on spot (AWS Spot Instance
    Advisor, May 2025: 10 to 20 % of H100 instances a month). `replaced_share`: failures after which the node is gone
    (Llama 3: 78 % hardware). `repair_hours`: until it is back. `detect_seconds`: to notice and find the culprit
    (MegaScale, arXiv 2402.15627, states less than ten minutes in the mean; a dead process of ours is seen at once, a
    silent one by timeout).
    `pause_seconds`: what a checkpoint stops the work for besides copying (all ranks agree, files are opened).
    `start_seconds`: new processes up to the first step, without reading the state. `storage_bytes_per_second`: of one
    node, shared storage at work (Llama 3: 2 TB/s over 2,048 nodes; BLOOM: 2.3 TB in 40 s from 48 nodes).
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
    """What a run of many steps meets. Shares are of the elapsed time; `None` where nothing is known or asked.

    `goodput` is the share of the elapsed time that ends up in the model: what checkpoints stall, what failures throw
    away and what restarts take is the rest; `goodput_interval` bounds it by failures as frequent, and as rare, as were
    seen elsewhere. `dollars` pays for the spare nodes too. Elapsed time and dollars are None too where failures come
    so fast that next to nothing is kept (LEAST_USEFUL).
    """

    mtbf_hours: float
    checkpoint_seconds: float  # of work between two checkpoints
    checkpoint_steps: int
    stall_seconds: float
    durable_seconds: float
    restart_seconds: float
    lost_work_seconds: float  # that one failure throws away, in the mean
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
        price = data["price"]
        bounds = tuple(data.get("goodput_interval", (data["goodput"],) * 2))
        priced = None if price is None else Price(**price)
        return RunForecast(**{**data, "goodput_interval": bounds, "price": priced})

    @property
    def never_ends(self) -> bool:
        """Whether failures come faster than the work can be saved."""
        return self.goodput < LEAST_USEFUL


def goodput(
    interval_seconds: float,
    *,
    stall_seconds: float,
    durable_seconds: float,
    restart_seconds: float,
    mtbf_seconds: float,
) -> float:
    """Useful share of the elapsed time of a long run, 0 to 1, when it saves after every `interval_seconds` of work."""
    if math.isinf(mtbf_seconds):
        return interval_seconds / (interval_seconds + stall_seconds)
    period = interval_seconds + stall_seconds
    # exp(-(period + durable) / m) / (1 - exp(-period / m)), arranged so that nothing overflows
    safe = math.exp(-(period + durable_seconds) / mtbf_seconds) / -math.expm1(-period / mtbf_seconds)
    return interval_seconds / mtbf_seconds * safe * math.exp(-restart_seconds / mtbf_seconds)


def young_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Young's first-order interval: sqrt(2 x stall x mtbf)."""
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


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

    # One peak: golden-section search over the logarithm, from the least to far past the mean life.
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
    """Fewest spares with which a failed node finds none left with a chance of `shortage` at most. Nodes under repair
    are Poisson: `nodes x failures_per_second x repair_seconds` in the mean. A single node has no spare."""
    if nodes <= 1:
        return 0
    mean = nodes * failures_per_second * repair_seconds
    term = below = math.exp(-mean) if mean < 700 else 0.0
    if not below:  # too many for the sum to start: the normal curve, 2.33 deviations for 1 %
        return math.ceil(mean + 2.33 * math.sqrt(mean))
    count = 0
    while 1 - below > shortage:
        count += 1
        term *= mean / count
        below += term
    return count


@dataclass(frozen=True)
class CheckpointCost:
    """Seconds that a checkpoint stops the work for, until it is safe, and that going on from one takes."""

    stall: float
    durable: float
    restart: float
    least: float  # between two, for storage's sake

    @staticmethod
    def of(state_bytes: float, cluster: Cluster, known: Reliability, asynchronous: bool) -> CheckpointCost:
        stall = known.pause_seconds + state_bytes / cluster.devices / known.copy_bytes_per_second
        durable = state_bytes / cluster.nodes / known.storage_bytes_per_second
        restart = known.detect_seconds + known.start_seconds + durable  # what was written is read again
        written = (stall, durable) if asynchronous else (stall + durable, 0.0)
        return CheckpointCost(*written, restart, durable / WRITING_SHARE)

    def best_steps(self, step_seconds: float, most_seconds: float, mtbf_seconds: float) -> int:
        """Steps between checkpoints that lose the least."""
        least = max(step_seconds, self.least)
        parts = {"stall_seconds": self.stall, "durable_seconds": self.durable, "least_seconds": least}
        seconds = best_interval(**parts, mtbf_seconds=mtbf_seconds)
        return max(1, round(min(seconds, most_seconds, 1e15) / step_seconds))

    def every(self, seconds: float) -> CheckpointCost:
        """With so many seconds of work between: each checkpoint waits until the one before it is written."""
        return replace(self, stall=max(self.stall, self.durable - seconds))

    def goodput(self, interval_seconds: float, mtbf_seconds: float) -> float:
        parts = {"stall_seconds": self.stall, "durable_seconds": self.durable, "restart_seconds": self.restart}
        return goodput(interval_seconds, **parts, mtbf_seconds=mtbf_seconds)


def outlook(
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
    """What failures and prices make of a run of `steps` steps (0: a long one) of `step_seconds` each.

    `parameters` are the model's, `asynchronous` says whether the work goes on while a checkpoint is written. `every` is
    the number of steps between checkpoints, 0 for one at the end alone, None for as many as lose the least.
    """
    known = reliability or Reliability()
    reclaimed = known.spot_per_1000_node_days if spot else 0.0

    def mtbf_at(failures: float) -> float:
        rate = (failures + reclaimed) * cluster.nodes
        return 1000 * DAY_SECONDS / rate if rate else math.inf

    mtbf, total = mtbf_at(known.failures_per_1000_node_days), steps * step_seconds if steps else math.inf
    saving = CheckpointCost.of(parameters * STATE_BYTES_PER_PARAMETER, cluster, known, asynchronous)
    if every is None:
        every = saving.best_steps(step_seconds, total, mtbf)
    elif every == 0 or (steps and every > steps):
        every = steps or round(1e15 / step_seconds)
    interval = every * step_seconds
    saving = saving.every(interval)
    useful = saving.goodput(interval, mtbf)
    low, high = (saving.goodput(interval, mtbf_at(rate)) for rate in (known.most_failures, known.least_failures))
    spares = spare_nodes(cluster.nodes, known.replaced_share / mtbf / cluster.nodes, known.repair_hours * 3600)
    elapsed = total / useful if steps and useful >= LEAST_USEFUL else None
    price = price_of(cluster, spot)
    dollars = None
    if price is not None and elapsed is not None:
        paid = cluster.devices + spares * cluster.devices_per_node
        dollars = elapsed / 3600 * paid * price.dollars_per_hour
    return RunForecast(
        mtbf_hours=min(mtbf / 3600, 1e9),
        checkpoint_seconds=interval,
        checkpoint_steps=every,
        stall_seconds=saving.stall,
        durable_seconds=saving.durable,
        restart_seconds=saving.restart,
        lost_work_seconds=saving.durable + interval / 2,
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
    """Of one device-hour: what the job says, else the table's; None where neither knows."""
    if cluster.dollars_per_hour is not None:
        return Price(cluster.dollars_per_hour, "job")
    row = _prices().get(cluster.device.name)
    figure = row["spot" if spot else "on_demand"] if row else ""
    return Price(float(figure), row["as_of"]) if row and figure else None


@cache
def _prices() -> dict[str, dict[str, str]]:
    lines = [line for line in PRICES_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {row["name"]: row for row in csv.DictReader(lines)}
