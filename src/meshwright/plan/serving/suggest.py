"""Where no way to serve works: why, and the nearest pins, devices or goals that work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from meshwright.errors import Problem
from meshwright.plan.serving.load import Replica
from meshwright.plan.serving.splits import (
    ServingOption,
    ServingQuery,
    ServingSplit,
    at_rate,
    busy_options,
    excess,
    fewest_replicas,
    precisions,
    splits_of,
)

#: The most devices that are suggested.
MOST_DEVICES = 4096
_TIMES = ("ttft_seconds", "tpot_seconds")


def nearest_fit(query: ServingQuery, rejected: list[tuple[str, str]]) -> Problem:
    """The problem where no split fits: the last reason, and the pin, precision or number of devices that would fit."""
    what = "no way to serve this fits"
    if rejected:
        split, reason = rejected[-1]
        what = f"{what}: {split} {reason}"
    pins = [f"serve.{n}" for n in ("tp", "max_batch", "max_len", "precision") if getattr(query.pins, n) is not None]
    return Problem(", ".join(pins) or "serve", what, f"nearest: {_nearest_fit_words(query)}")


def _nearest_fit_words(query: ServingQuery) -> str:
    """The first change that fits: one pin, all pins, fewer bits, more devices."""
    pins = query.pins
    for name in ("max_batch", "max_len", "tp", "precision"):
        if getattr(pins, name) is None:
            continue
        if fitting := _fitting(replace(query, pins=replace(pins, **{name: None}))):
            first = fitting[0]
            values = {"max_len": first.memory.longest, "tp": first.model.tp, "precision": first.model.precision}
            return f"serve.{name}={_most_batch(query) if name == 'max_batch' else values[name]}"
    if fitting := _fitting(replace(query, pins=replace(pins, tp=None, max_batch=None, max_len=None))):
        return f"without these pins: {fitting[0]}, up to {fitting[0].most_batch} at once"
    for precision in query.server.precisions:
        if precision != query.precision and _fitting(replace(query, precision=precision), precision):
            return f"serve.precision={precision}"
    if query.server.replicas:
        devices = query.devices
        while devices < MOST_DEVICES:
            devices *= 2
            if _fitting(replace(query, devices=devices)):
                return f"cluster.devices={devices}"
    return "a smaller model, or a machine with more memory"


def _fitting(query: ServingQuery, precision: str | None = None) -> list[ServingSplit]:
    return list(splits_of(query, precision or query.pins.precision or query.precision, []))


def _most_batch(query: ServingQuery) -> int:
    """The largest batch below the pinned one that fits; 1 does."""
    works, fails = 1, query.pins.max_batch or 1
    while fails - works > 1:
        middle = (works + fails) // 2
        smaller = replace(query, pins=replace(query.pins, max_batch=middle))
        if any(_fitting(smaller, precision) for precision in precisions(smaller)):
            works = middle
        else:
            fails = middle
    return works


def nearest_target(query: ServingQuery, splits: list[ServingSplit]) -> Problem:
    """The problem where splits fit and none meets the target: the goal missed by least, and a value that is met."""
    target = query.target
    offers = list(_offers(query, splits))
    _, near = min(offers, default=(math.inf, "a smaller model, or quicker devices"))
    goals = ", ".join(f"serve.{key}" for key in target.goals) or "serve"
    sizes = f"{target.prompt_tokens} tokens in and {target.output_tokens} out"
    return Problem(goals, f"no way to serve requests of {sizes} meets the target", f"nearest: {near}")


def _offers(query: ServingQuery, splits: list[ServingSplit]) -> Iterator[tuple[float, str]]:
    """(factor by which a goal is missed, the values that can be met)."""
    target = query.target
    if target.requests_per_second is not None:
        slower = max(_most_rate(query, split) for split in splits)
        if slower > 0:
            value = _round(slower, down=True)
            more = _more_devices(query, splits)
            words = f"serve.requests_per_second={value:g}" + (f", or cluster.devices={more}" if more else "")
            yield target.requests_per_second / slower, words
    for key in _TIMES:
        if (most := getattr(target, key)) is None:
            continue
        looser = replace(query, target=target.without(key))
        meeting = [one for split in splits for one in _options(looser, split) if not one.missed]
        if meeting:
            least = min(getattr(one.load, key) for one in meeting)
            yield least / most, f"serve.{key}={_round(least):g}"
    if len(target.goals) > 1:
        yield _all_goals(query, splits)


def _all_goals(query: ServingQuery, splits: list[ServingSplit]) -> tuple[float, str]:
    """Every goal a little looser: the option that misses by least, at the target's rate or half of the capacity."""
    target, options = query.target, []
    for split in splits:
        options += list(_options(query, split))
        if target.requests_per_second is not None:
            half = Replica(split.model, target.prompt_tokens, target.output_tokens, split.most_batch).capacity() / 2
            rate = min(half * split.most_replicas, target.requests_per_second)
            option = at_rate(query, split, rate, split.most_replicas)
            options += [option] if option is not None else []

    def factor(one: ServingOption) -> float:
        return excess(target, one) * max(1.0, (target.requests_per_second or 0.0) / one.rate)

    best = min(options, key=factor)
    words = []
    for key in target.goals:
        goal = getattr(target, key)
        if key == "requests_per_second":
            words.append(f"serve.{key}={goal if best.rate >= goal * 0.9999 else _round(best.rate, down=True):g}")
        else:
            seconds = getattr(best.load, key)
            words.append(f"serve.{key}={goal if seconds <= goal else _round(seconds):g}")
    return 2 * factor(best), " ".join(words)


def _options(query: ServingQuery, split: ServingSplit) -> Iterable[ServingOption]:
    """A split with all its replicas: at the target's rate, or batch by batch where it has none."""
    if (rate := query.target.requests_per_second) is None:
        return busy_options(query, split)
    option = at_rate(query, split, rate, split.most_replicas)
    return [] if option is None else [option]


def _most_rate(query: ServingQuery, split: ServingSplit) -> float:
    """The most requests per second that a split answers in time; 0 where it never does."""
    target = query.target
    capacity = Replica(split.model, target.prompt_tokens, target.output_tokens, split.most_batch).capacity()
    low, high = 0.0, capacity * split.most_replicas
    for _ in range(30):
        middle = (low + high) / 2
        option = at_rate(query, split, middle, split.most_replicas)
        low, high = (middle, high) if option is not None and not option.missed else (low, middle)
    return low if low > high * 1e-6 else 0.0


def _more_devices(query: ServingQuery, splits: list[ServingSplit]) -> int | None:
    """The fewest devices, in whole nodes, that meet the target at its rate; None where no number does."""
    rate = query.target.requests_per_second
    if not query.server.replicas or rate is None:
        return None
    counts = []
    for split in splits:
        option = fewest_replicas(query, split, rate, MOST_DEVICES // split.devices)
        if option is not None and not option.missed:
            counts.append(_whole_nodes(option.devices))
    return min(counts, default=None)


def _whole_nodes(devices: int) -> int:
    """`devices` rounded up to what tensor parallelism divides: 1, 2, 4, or a multiple of 8."""
    return 1 << (devices - 1).bit_length() if devices <= 8 else 8 * math.ceil(devices / 8)


def _round(value: float, *, down: bool = False) -> float:
    """Three digits, rounded up for a time and down for a rate, so that the suggested value can be met."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.floor(value / unit - 1e-9) if down else math.ceil(value / unit + 1e-9)
    return float(f"{steps * unit:.6g}")
