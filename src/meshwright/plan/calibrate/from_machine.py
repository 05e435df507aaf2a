"""A profile from what `probe.machine` measured: constants solved from the parts' own formulas, nothing fitted to steps.

A part timed alone runs in warmer caches than inside a step, by as much on one CPU as on the next. So a CPU's constant
moves by the ratio of what was measured here to what the same probe measured on the machine of `cpu_constants.py`: where
the start was fitted to steps, what the fit learnt about steps is kept.

Each constant is read off the rows that it alone decides, or, where a formula has several (a product's arithmetic, its
start), solved by least squares on relative errors, drawn a little to what was supposed. What was not measured stays as
it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.plan.constants import DATASHEET, Profile
from meshwright.plan.constants.profile import constant, within
from meshwright.plan.cost.cpu import GATHER_BYTES, KEPT_LENGTH, OPTIMIZER_BYTES, QUERIES_AT_ONCE

WORDS = ("fp32", "bf16")
BYTES = {"fp32": 4, "bf16": 2}
#: Operations of a layer's forward pass as plan/cost/cpu.py counts them, of the layer that the probe times.
LAYER_OPERATIONS = {"fp32": 47, "bf16": 81}
#: What adding gradients costs FSDP2's bf16 (fp32 sums of bf16 gradients) beyond plain bf16's, in bytes a parameter.
MORE_ADDING = {"fp32": 0, "bf16": 12}
#: Weight of what was supposed of a coefficient beside one measurement.
TOWARDS_SUPPOSED = 0.02
#: Share of the processors that a quiet machine leaves a process at least (0.98 was found; 0.5 to 0.75 beside others').
QUIET = 0.9
#: The 90 % interval of a profile that was measured on the machine itself: of 69 runs of models that no fit had seen,
#: nine in ten took 0.84 to 1.29 times what was predicted by one day's probe, down to 0.6 times by another's
#: (`bench.runs`); other machines and models stray further.
INTERVAL = (0.6, 1.48)


@dataclass(frozen=True)
class Change:
    """A constant that was measured: what it was, what it is."""

    constant: str
    before: float
    after: float
    unit: str
    what: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "constant": self.constant,
            "from": self.before,
            "to": self.after,
            "unit": self.unit,
            "what": self.what,
        }


def machine_profile(raw: Mapping[str, Any], cluster: Cluster, start: Profile, name: str) -> Profile:
    """`start` with the constants that `raw` (of probe.machine) decides. `cluster` is this machine with a rank a core,
    or its GPUs. What a busy machine kept from being measured is as before, and said."""
    if raw["kind"] == "cpu":
        solved = _cpu(raw, cluster, DATASHEET.constants)
        values = {key: start[key] * value / DATASHEET[key] for key, value in solved.items()}
    else:
        values = _cuda(raw, cluster, start)
    found = {key: within(key, value) for key, value in values.items() if math.isfinite(value) and value > 0}
    changed = start.changed(found, name)
    said = (f"speeds measured on this machine in {raw['seconds']:g} s", *disturbances(raw))
    low, high = INTERVAL
    share = _processors(raw, "busy")
    intervals = {**start.intervals, raw["kind"]: (low * share if share < QUIET else low, high)}
    kept = {key: pair for key, pair in intervals.items() if not key.startswith(raw["kind"] + ".")}
    return Profile(name, changed.constants, kept, said, 0, changed.corrections)


def disturbances(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What other work on the machine did to the figures, in words; () where it was quiet."""
    effects = {
        "busy": "its processes got {:.0f} % of the processors; links and memory may be quicker, and so may runs",
        "together": "this process got {:.0f} % of the processors; what threads add is as before",
    }
    shares = {part: _processors(raw, part) for part in effects}
    return tuple(
        f"the machine was busy: {effect.format(100 * shares[part])}; measure again when it is quiet"
        for part, effect in effects.items()
        if shares[part] < QUIET
    )


def _processors(raw: Mapping[str, Any], part: str) -> float:
    """Share of its processors that a part of the probe got; one where that was not measured."""
    return float((raw[part] or {}).get("processors", 1.0))


def changes(before: Profile, after: Profile) -> list[Change]:
    """Constants that differ by more than 1 %, the largest moves first."""
    found = []
    for name, value in after.constants.items():
        old = before.constants[name]
        if abs(value - old) > 0.01 * abs(old):
            row = constant(name)
            found.append(Change(name, old, value, row.unit, row.what))
    return sorted(found, key=lambda change: -abs(math.log(max(change.after, 1e-30) / max(change.before, 1e-30))))


def _cpu(raw: Mapping[str, Any], cluster: Cluster, before: Mapping[str, float]) -> dict[str, float]:
    device, busy = cluster.device, raw["busy"]
    memory = device.memory_bytes_per_second
    found: dict[str, float] = {}
    starts: dict[float, float] = {}  # by the shortest product, which shows its start best
    for word in WORDS:
        rows = [row for row in busy["products"] if row["precision"] == word]
        peak = device.flops[word]
        each, start = _product_terms(
            rows, (1 / (peak * before[f"cpu.product.{word}.share"]), before["cpu.product.start_seconds"])
        )
        found[f"cpu.product.{word}.share"] = 1 / (each * peak)
        starts[min(row["forward"] for row in rows)] = start
        found[f"cpu.product.{word}.weight_share"] = _weight_rate(rows, start) / peak
        found |= _attention([row for row in busy["attention"] if row["precision"] == word], word, peak, before)
        found |= _chains([row for row in busy["chains"] if row["precision"] == word], word, memory)
        losses = [row for row in busy["losses"] if row["precision"] == word]
        found[f"cpu.loss.{word}.small_seconds"] = losses[0]["seconds"] / losses[0]["logits"]
        found[f"cpu.loss.{word}.large_seconds"] = losses[-1]["seconds"] / losses[-1]["logits"]
    found["cpu.product.start_seconds"] = starts[min(starts)]
    found["cpu.product.operand_share"] = busy["read_bytes_per_second"] / memory
    update = busy["optimizer"]
    found["cpu.optimizer.share"] = OPTIMIZER_BYTES * update["elements"] / update["seconds"] / memory
    found |= _layers(busy["layers"], device.launch_seconds, memory)
    if raw["together"] and _processors(raw, "together") >= QUIET:
        found |= _threads(busy, raw["together"])
    return found | _links(raw["links"], cluster)


def _product_terms(rows: Sequence[Mapping[str, Any]], supposed: tuple[float, float]) -> tuple[float, ...]:
    """(seconds a flop, seconds to start), from forward and input gradient. What the probe repeats stays in the caches,
    so its operands cost nothing."""
    terms, times = [], []
    for row in rows:
        for way in ("forward", "input_gradient"):
            terms.append((2.0 * row["rows"] * row["inner"] * row["columns"], 1.0))
            times.append(row[way])
    return _solve(terms, times, supposed)


def _weight_rate(rows: Sequence[Mapping[str, Any]], start: float) -> float:
    """Flops a second of the products that give a weight's gradient, once the start is taken off."""
    rates = []
    for row in rows:
        left = max(row["weight_gradient"] - start, 0.2 * row["weight_gradient"])
        rates.append(2.0 * row["rows"] * row["inner"] * row["columns"] / left)
    return statistics.median(rates)


def _attention(
    rows: Sequence[Mapping[str, Any]], word: str, peak: float, before: Mapping[str, float]
) -> dict[str, float]:
    """Products of attention and the softmax of a score, forward and backward, as plan/cost/cpu.py writes them."""
    names = [f"cpu.attention.{word}.{end}" for end in ("share", "score_seconds", "score_backward_seconds")]
    terms, times = [], []
    for row in rows:
        block = min(QUERIES_AT_ONCE, row["length"])
        scores = row["batch"] * row["heads"] * row["length"] * (row["length"] + block) / 2
        flops = 4.0 * row["width"] * scores
        again = word == "fp32" or row["length"] > KEPT_LENGTH
        terms += [(flops, scores, 0.0), (flops * (2.5 if again else 2.0), scores if again else 0.0, scores)]
        times += [row["forward"], row["backward"]]
    each, ahead, back = _solve(terms, times, (1 / (peak * before[names[0]]), before[names[1]], before[names[2]]))
    return {names[0]: 1 / (each * peak), names[1]: ahead, names[2]: back}


def _chains(rows: Sequence[Mapping[str, Any]], word: str, memory: float) -> dict[str, float]:
    """Speed of memory-bound chains: a forward on tensors that the caches hold, and both passes (the backward moves
    twice) on tensors that they do not."""
    small, large = rows[0], rows[-1]
    seconds = large["forward"] + large["backward"]
    return {
        f"cpu.elementwise.{word}.small_share": small["moved"] * BYTES[word] / small["forward"] / memory,
        f"cpu.elementwise.{word}.large_share": 3 * large["moved"] * BYTES[word] / seconds / memory,
    }


def _layers(rows: Sequence[Mapping[str, Any]], launch: float, memory: float) -> dict[str, float]:
    """The host's work on a layer, from tiny ones, and FSDP2's copies, from wide ones."""
    found: dict[str, float] = {}
    starts, checkpoints, copies = [], [], []
    for word in WORDS:
        tiny, wide = (row for row in rows if row["precision"] == word)
        starts.append(tiny["plain"] / (3 * LAYER_OPERATIONS[word] * launch))
        sharding = max(tiny["sharded"] - tiny["plain"], 1e-6)
        found[f"cpu.host.sharding.{word}.seconds"] = sharding
        checkpoints.append(max(tiny["checkpointed"] - tiny["plain"] - tiny["forward"], 1e-6))
        seconds = wide["sharded"] - wide["plain"] - sharding
        copies.append(wide["elements"] * (GATHER_BYTES[word] + MORE_ADDING[word]) / max(seconds, 1e-5) / memory)
    found["cpu.host.share"] = statistics.fmean(starts)
    found["cpu.host.checkpoint_seconds"] = statistics.fmean(checkpoints)
    found["cpu.copy.share"] = min(statistics.fmean(copies), 2.0)
    return found


def _threads(busy: Mapping[str, Any], together: Mapping[str, Any]) -> dict[str, float]:
    """What a further thread of a process adds, beside a process of its own."""
    more = together["threads"] - 1

    def added(key: str, way: str) -> float:
        pairs = zip(busy[key], together[key], strict=True)
        speedup = statistics.median(alone[way] / all_of_them[way] for alone, all_of_them in pairs)
        return min(max((speedup - 1) / more, 0.02), 1.2)

    return {
        "cpu.threads.product_share": added("products", "forward"),
        "cpu.threads.memory_share": statistics.fmean([added("chains", "forward"), added("chains", "backward")]),
    }


def _links(rows: Sequence[Mapping[str, Any]], cluster: Cluster) -> dict[str, float]:
    """Latency of the smallest message and speed of the large ones, by collective."""
    found = {}
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
        found[f"cpu.net.{name}.latency"] = latency / (link.latency_seconds * hops)
        found[f"cpu.net.{name}.share"] = statistics.median(speeds) / link.bytes_per_second
    return found


def _cuda(raw: Mapping[str, Any], cluster: Cluster, start: Profile) -> dict[str, float]:
    """GPUs: the ceiling of products, memory-bound chains, starts, the update, and NCCL's bus."""
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
    found = {
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
        found["cuda.net.ring_share"] = bus / cluster.intra.bytes_per_second / (1 - start["cuda.net.few_ranks"] / n)
    return found


def _solve(terms: Sequence[tuple[float, ...]], times: Sequence[float], supposed: Sequence[float]) -> tuple[float, ...]:
    """Coefficients by least squares of relative errors, each drawn a little to what was `supposed` (above zero): terms
    that grow together stay sensible, and noise turns none negative."""
    scale = np.array(supposed)
    matrix = np.array([[value / seconds for value in row] for row, seconds in zip(terms, times, strict=True)]) * scale
    rows = np.concatenate([matrix, TOWARDS_SUPPOSED * np.eye(len(scale))])
    aims = np.concatenate([np.ones(len(matrix)), TOWARDS_SUPPOSED * np.ones(len(scale))])
    solved = np.linalg.lstsq(rows, aims, rcond=None)[0]
    return tuple(float(value) for value in np.maximum(solved, 0.05) * scale)
