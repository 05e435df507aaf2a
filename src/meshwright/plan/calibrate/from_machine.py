"""A profile from the measurements of `probe.machine`: constants solved from each part's formula, not fitted to steps.

A part timed alone runs in warmer caches than inside a step, by about the same factor on every CPU. So a CPU's constant
is multiplied by the ratio of its value here to the value that the same probe measured for `constants/cpu.py`; what a
fit to steps taught the start profile thus remains.

Each constant is computed from the rows that depend on it alone, or, where a formula has several (a product's arithmetic
and its start), solved by least squares on relative errors with a weak prior. Other constants stay as they were.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.constants.profile import constant, within
from meshwright.plan.cost.block_memory import ELEMENT_BYTES
from meshwright.plan.cost.cpu import GATHER_BYTES, KEPT_LENGTH, OPTIMIZER_BYTES, QUERIES_AT_ONCE

WORDS = ("fp32", "bf16")
#: Operations of the forward pass of the layer that the probe times, as plan/cost/cpu.py counts them.
LAYER_OPERATIONS = {"fp32": 47, "bf16": 81}
#: Bytes per parameter that FSDP2 moves to add bf16 gradients to fp32 sums, beyond adding plain bf16 gradients.
EXTRA_ACCUMULATE_BYTES = {"fp32": 0, "bf16": 12}
#: Weight of the prior of a coefficient, relative to one measurement.
PRIOR_WEIGHT = 0.02
#: Least share of its processors that a process gets on a quiet machine (0.98 measured; 0.5 to 0.75 on busy ones).
QUIET = 0.9
#: The 90 % interval of a profile measured on the machine itself. Of 69 runs of models that were not fitted, nine in ten
#: took 0.84 to 1.29 times the prediction by one day's probe, and down to 0.6 times by another day's (`bench.runs`);
#: other machines and models differ more.
INTERVAL = (0.6, 1.48)


@dataclass(frozen=True)
class Change:
    """A changed constant."""

    constant: str
    before: float
    after: float
    unit: str
    what: str

    def as_dict(self) -> dict[str, Any]:
        values = {"constant": self.constant, "from": self.before, "to": self.after}
        return {**values, "unit": self.unit, "what": self.what}


def machine_profile(raw: Mapping[str, Any], cluster: Cluster, start: Profile, name: str) -> Profile:
    """`start` with the constants that `raw` (of probe.machine) gives. `cluster` is this machine with one rank per core,
    or its GPUs. Constants that a busy machine hides stay as they were, and `assumed` says so."""
    if raw["kind"] == "cpu":
        solved = _cpu(raw, cluster, DATASHEET.constants)
        values = {key: start[key] * value / DATASHEET[key] for key, value in solved.items()}
    else:
        values = _cuda(raw, cluster, start)
    constants = {key: within(key, value) for key, value in values.items() if math.isfinite(value) and value > 0}
    assumed = (f"speeds measured on this machine in {raw['seconds']:g} s", *disturbances(raw))
    low, high = INTERVAL
    share = _processors(raw, "busy")
    intervals = {**start.intervals, raw["kind"]: (low * share if share < QUIET else low, high)}
    intervals = {key: pair for key, pair in intervals.items() if not key.startswith(raw["kind"] + ".")}
    return replace(start.changed(constants, name), intervals=intervals, assumed=assumed, fitted_rows=0)


def disturbances(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """How other work on the machine affected the figures, in words; () if it was quiet."""
    effects = {
        "busy": "its processes got {:.0f} % of the processors; links, memory and runs may be faster",
        "together": "this process got {:.0f} % of the processors; what threads add is as before",
    }
    shares = {part: _processors(raw, part) for part in effects}
    return tuple(
        f"the machine was busy: {effect.format(100 * shares[part])}; measure again when it is quiet"
        for part, effect in effects.items()
        if shares[part] < QUIET
    )


def _processors(raw: Mapping[str, Any], part: str) -> float:
    """Share of its processors that a part of the probe got; 1 if that was not measured."""
    return float((raw[part] or {}).get("processors", 1.0))


def changes(before: Profile, after: Profile) -> list[Change]:
    """Constants that differ by more than 1 %, the largest change first."""
    rows = []
    for name, value in after.constants.items():
        old = before.constants[name]
        if abs(value - old) > 0.01 * abs(old):
            row = constant(name)
            rows.append(Change(name, old, value, row.unit, row.what))
    return sorted(rows, key=lambda change: -abs(math.log(max(change.after, 1e-30) / max(change.before, 1e-30))))


def _cpu(raw: Mapping[str, Any], cluster: Cluster, before: Mapping[str, float]) -> dict[str, float]:
    device, busy = cluster.device, raw["busy"]
    memory = device.memory_bytes_per_second
    constants: dict[str, float] = {}
    starts: dict[float, float] = {}  # by the seconds of the shortest product, which shows its start best
    for word in WORDS:
        rows = [row for row in busy["products"] if row["precision"] == word]
        peak = device.flops[word]
        flop, start = _product_terms(
            rows, (1 / (peak * before[f"cpu.product.{word}.share"]), before["cpu.product.start_seconds"])
        )
        constants[f"cpu.product.{word}.share"] = 1 / (flop * peak)
        starts[min(row["forward"] for row in rows)] = start
        constants[f"cpu.product.{word}.weight_share"] = _weight_rate(rows, start) / peak
        constants |= _attention([row for row in busy["attention"] if row["precision"] == word], word, peak, before)
        constants |= _chains([row for row in busy["chains"] if row["precision"] == word], word, memory)
        losses = [row for row in busy["losses"] if row["precision"] == word]
        constants[f"cpu.loss.{word}.small_seconds"] = losses[0]["seconds"] / losses[0]["logits"]
        constants[f"cpu.loss.{word}.large_seconds"] = losses[-1]["seconds"] / losses[-1]["logits"]
    constants["cpu.product.start_seconds"] = starts[min(starts)]
    constants["cpu.product.operand_share"] = busy["read_bytes_per_second"] / memory
    update = busy["optimizer"]
    constants["cpu.optimizer.share"] = OPTIMIZER_BYTES * update["elements"] / update["seconds"] / memory
    constants |= _layers(busy["layers"], device.launch_seconds, memory)
    if raw["together"] and _processors(raw, "together") >= QUIET:
        constants |= _threads(busy, raw["together"])
    return constants | _links(raw["links"], cluster)


def _product_terms(rows: Sequence[Mapping[str, Any]], prior: tuple[float, float]) -> tuple[float, ...]:
    """(seconds per flop, seconds to start), from forward and input gradient. The probe repeats each product, so its
    operands are in the caches and cost nothing."""
    terms, times = [], []
    for row in rows:
        for way in ("forward", "input_gradient"):
            terms.append((2.0 * row["rows"] * row["inner"] * row["columns"], 1.0))
            times.append(row[way])
    return _solve(terms, times, prior)


def _weight_rate(rows: Sequence[Mapping[str, Any]], start: float) -> float:
    """Flops per second, without the start, of the products that compute weight gradients."""
    rates = []
    for row in rows:
        seconds = max(row["weight_gradient"] - start, 0.2 * row["weight_gradient"])
        rates.append(2.0 * row["rows"] * row["inner"] * row["columns"] / seconds)
    return statistics.median(rates)


def _attention(
    rows: Sequence[Mapping[str, Any]], word: str, peak: float, before: Mapping[str, float]
) -> dict[str, float]:
    """Products of attention and the softmax of a score, forward and backward, by plan/cost/cpu.py's formula."""
    names = [f"cpu.attention.{word}.{end}" for end in ("share", "score_seconds", "score_backward_seconds")]
    terms, times = [], []
    for row in rows:
        block = min(QUERIES_AT_ONCE, row["length"])
        scores = row["batch"] * row["heads"] * row["length"] * (row["length"] + block) / 2
        flops = 4.0 * row["width"] * scores
        again = word == "fp32" or row["length"] > KEPT_LENGTH
        terms += [(flops, scores, 0.0), (flops * (2.5 if again else 2.0), scores if again else 0.0, scores)]
        times += [row["forward"], row["backward"]]
    flop, ahead, back = _solve(terms, times, (1 / (peak * before[names[0]]), before[names[1]], before[names[2]]))
    return {names[0]: 1 / (flop * peak), names[1]: ahead, names[2]: back}


def _chains(rows: Sequence[Mapping[str, Any]], word: str, memory: float) -> dict[str, float]:
    """Speed of memory-bound chains: of a forward on tensors that fit the caches, and of both passes (the backward moves
    twice as much) on larger ones."""
    small, large = rows[0], rows[-1]
    seconds = large["forward"] + large["backward"]
    return {
        f"cpu.elementwise.{word}.small_share": small["moved"] * ELEMENT_BYTES[word] / small["forward"] / memory,
        f"cpu.elementwise.{word}.large_share": 3 * large["moved"] * ELEMENT_BYTES[word] / seconds / memory,
    }


def _layers(rows: Sequence[Mapping[str, Any]], launch: float, memory: float) -> dict[str, float]:
    """The host's work on a layer, from tiny layers, and FSDP2's copies, from wide layers."""
    constants: dict[str, float] = {}
    starts, checkpoints, copies = [], [], []
    for word in WORDS:
        tiny, wide = (row for row in rows if row["precision"] == word)
        starts.append(tiny["plain"] / (3 * LAYER_OPERATIONS[word] * launch))
        sharding = max(tiny["sharded"] - tiny["plain"], 1e-6)
        constants[f"cpu.host.sharding.{word}.seconds"] = sharding
        checkpoints.append(max(tiny["checkpointed"] - tiny["plain"] - tiny["forward"], 1e-6))
        seconds = wide["sharded"] - wide["plain"] - sharding
        copied = wide["elements"] * (GATHER_BYTES[word] + EXTRA_ACCUMULATE_BYTES[word])
        copies.append(copied / max(seconds, 1e-5) / memory)
    constants["cpu.host.share"] = statistics.fmean(starts)
    constants["cpu.host.checkpoint_seconds"] = statistics.fmean(checkpoints)
    constants["cpu.copy.share"] = min(statistics.fmean(copies), 2.0)
    return constants


def _threads(busy: Mapping[str, Any], together: Mapping[str, Any]) -> dict[str, float]:
    """Speed that a further thread of a process adds, relative to the first."""
    more = together["threads"] - 1

    def added(key: str, way: str) -> float:
        pairs = zip(busy[key], together[key], strict=True)
        speedup = statistics.median(one[way] / many[way] for one, many in pairs)
        return min(max((speedup - 1) / more, 0.02), 1.2)

    return {
        "cpu.threads.product_share": added("products", "forward"),
        "cpu.threads.memory_share": statistics.fmean([added("chains", "forward"), added("chains", "backward")]),
    }


def _links(rows: Sequence[Mapping[str, Any]], cluster: Cluster) -> dict[str, float]:
    """Latency of the smallest message and speed of the large messages, by collective."""
    constants = {}
    link = cluster.intra
    for name in sorted({row["collective"] for row in rows}):
        mine = [row for row in rows if row["collective"] == name]
        n = mine[0]["ranks"]
        hops = 1.0 if name == "point_to_point" else math.log2(n)
        latency = min(mine, key=lambda row: float(row["bytes"]))["seconds"]
        ways = {"point_to_point": 1.0, "all_reduce": 2 * (n - 1) / n}.get(name, (n - 1) / n)
        speeds = [
            row["bytes"] * ways / max(row["seconds"] - latency, 0.2 * row["seconds"])
            for row in mine
            if row["bytes"] >= 1 << 20
        ]
        constants[f"cpu.net.{name}.latency"] = latency / (link.latency_seconds * hops)
        constants[f"cpu.net.{name}.share"] = statistics.median(speeds) / link.bytes_per_second
    return constants


def _cuda(raw: Mapping[str, Any], cluster: Cluster, start: Profile) -> dict[str, float]:
    """GPUs: the ceiling of products, memory speed, the host's starts, the optimizer, and NCCL's bus bandwidth."""
    device, busy = cluster.device, raw["busy"]
    rates: dict[str, list[float]] = {}
    for row in busy["products"]:
        flops = 2.0 * row["rows"] * row["inner"] * row["columns"]
        rates.setdefault(row["precision"], []).append(flops / row["forward"])
    best = max(rates["bf16"])
    ceiling = device.real_flops.get("bf16", 0.0) or device.flops["bf16"] * start["cuda.product.unmeasured"]
    read = busy["read_bytes_per_second"]
    tiny = busy["layers"][0]
    update = busy["optimizer"]
    constants = {
        "cuda.product.share": best / ceiling,
        "cuda.memory.share": read / device.memory_bytes_per_second,
        "cuda.host.share": tiny["plain"] / ((1 + start["cuda.host.backward"]) * LAYER_OPERATIONS["fp32"])
        / device.launch_seconds,
        "cuda.optimizer.bytes": update["seconds"] * read / update["elements"],
    }  # fmt: skip
    large = [row for row in raw["links"] if row["collective"] == "all_reduce" and row["bytes"] >= 1 << 24]
    if large:
        n = large[0]["ranks"]
        bus = max(2 * (n - 1) / n * row["bytes"] / row["seconds"] for row in large)
        constants["cuda.net.ring_share"] = bus / cluster.intra.bytes_per_second / (1 - start["cuda.net.few_ranks"] / n)
    return constants


def _solve(terms: Sequence[tuple[float, ...]], times: Sequence[float], prior: Sequence[float]) -> tuple[float, ...]:
    """Coefficients by least squares of relative errors, with a weak `prior` (above zero): correlated terms stay
    sensible, and noise makes none negative."""
    scale = np.array(prior)
    matrix = np.array([[value / seconds for value in row] for row, seconds in zip(terms, times, strict=True)]) * scale
    rows = np.concatenate([matrix, PRIOR_WEIGHT * np.eye(len(scale))])
    aims = np.concatenate([np.ones(len(matrix)), PRIOR_WEIGHT * np.ones(len(scale))])
    solved = np.linalg.lstsq(rows, aims, rcond=None)[0]
    return tuple(float(value) for value in np.maximum(solved, 0.05) * scale)
