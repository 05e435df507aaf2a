"""The nearest request that can be answered, when the one asked for cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from meshwright.errors import Problem
from meshwright.plan.serving.load import Replica
from meshwright.plan.serving.result import ServingPins, Target
from meshwright.plan.serving.splits import (
    ServingOption,
    ServingQuery,
    ServingSplit,
    at_rate,
    batches,
    excess,
    precisions,
    rated,
    splits_of,
)

#: Devices looked at when a request is too much for those there are.
MOST_DEVICES = 4096
_TIMES = ("ttft_seconds", "tpot_seconds")


def nearest_fit(question: ServingQuery, rejected: list[tuple[str, str]]) -> Problem:
    """What to say where no way fits: the closest, and the pin, precision or number of devices that would."""
    what = "no way to serve this fits"
    if rejected:
        way, reason = rejected[-1]
        what = f"{what}: {way} {reason}"
    return Problem(_pinned(question.pins), what, f"nearest: {_smaller(question)}")


def _pinned(pins: ServingPins) -> str:
    said = [f"serve.{name}" for name in ("tp", "max_batch", "max_len", "precision") if getattr(pins, name) is not None]
    return ", ".join(said) or "serve"


def _smaller(question: ServingQuery) -> str:
    """Fewer pins first, then fewer bits, then more devices; what none of them mends is too large for this engine."""
    pins = question.pins
    for name in ("max_batch", "max_len", "tp", "precision"):
        if getattr(pins, name) is None:
            continue
        freed = replace(question, pins=replace(pins, **{name: None}))
        if ways := _any(freed):
            return f"serve.{name}={_most_batch(question) if name == 'max_batch' else _value(freed, ways[0], name)}"
    if ways := _any(replace(question, pins=replace(pins, tp=None, max_batch=None, max_len=None))):
        return f"without these pins: {ways[0]}, up to {ways[0].most_batch} at once"
    for precision in question.server.precisions:
        if precision != question.precision and _any(replace(question, precision=precision), precision):
            return f"serve.precision={precision}"
    if question.server.replicas:
        devices = question.devices
        while devices < MOST_DEVICES:
            devices *= 2
            if _any(replace(question, devices=devices)):
                return f"cluster.devices={devices}"
    return "a smaller model, or a machine with more memory"


def _any(question: ServingQuery, precision: str | None = None) -> list[ServingSplit]:
    return list(splits_of(question, precision or question.pins.precision or question.precision, []))


def _most_batch(question: ServingQuery) -> int:
    """The largest batch below the one that is pinned for which there is a way; 1 works."""
    works, fails = 1, question.pins.max_batch or 1
    while fails - works > 1:
        middle = (works + fails) // 2
        asked = replace(question, pins=replace(question.pins, max_batch=middle))
        if any(_any(asked, precision) for precision in precisions(asked)):
            works = middle
        else:
            fails = middle
    return works


def _value(question: ServingQuery, way: ServingSplit, name: str) -> object:
    if name == "max_len":
        return way.memory.longest
    return way.model.tp if name == "tp" else way.model.precision


def nearest_target(question: ServingQuery, ways: list[ServingSplit]) -> Problem:
    """What to say where ways fit and none meets the target: the goal that is least out of reach, and its value."""
    target = question.target
    offers = list(_offers(question, ways))
    _, near = min(offers, default=(math.inf, "a smaller model, or quicker devices"))
    goals = [f"serve.{key}" for key in target.goals]
    sizes = f"{target.prompt_tokens} tokens in and {target.output_tokens} out"
    return Problem(
        ", ".join(goals) or "serve", f"no way to serve requests of {sizes} meets the target", f"nearest: {near}"
    )


def _offers(question: ServingQuery, ways: list[ServingSplit]) -> Iterator[tuple[float, str]]:
    """(factor by which a goal has to give way, the words)."""
    target = question.target
    if target.requests_per_second is not None:
        slower = max(_most_rate(question, way) for way in ways)
        if slower > 0:
            value = _round(slower, down=True)
            more = _more_devices(question, ways)
            words = f"serve.requests_per_second={value:g}" + (f", or cluster.devices={more}" if more else "")
            yield target.requests_per_second / slower, words
    for key in _TIMES:
        if (most := getattr(target, key)) is None:
            continue
        looser = target.without(key)
        found = [one for way in ways for one in _tries(question, way, looser) if not one.missed]
        if found:
            least = min(getattr(one.load, key) for one in found)
            yield least / most, f"serve.{key}={_round(least):g}"
    if len(target.goals) > 1:
        yield _all_wishes(question, ways)


def _all_wishes(question: ServingQuery, ways: list[ServingSplit]) -> tuple[float, str]:
    """Every goal giving way a little: what comes nearest of all ways, at the rate asked for or at half of a way's."""
    target, tried = question.target, []
    for way in ways:
        tried += list(_tries(question, way, target))
        if target.requests_per_second is not None:
            half = Replica(way.model, target.prompt_tokens, target.output_tokens, way.most_batch).capacity() / 2
            calm = at_rate(question, way, min(half * way.most_replicas, target.requests_per_second), way.most_replicas)
            tried += [calm] if calm is not None else []

    def short(one: ServingOption) -> float:
        return excess(target, one) * max(1.0, (target.requests_per_second or 0.0) / one.rate)

    best = min(tried, key=short)
    words = []
    for key in target.goals:
        goal = getattr(target, key)
        if key == "requests_per_second":
            words.append(f"serve.{key}={goal if best.rate >= goal * 0.9999 else _round(best.rate, down=True):g}")
        else:
            got = getattr(best.load, key)
            words.append(f"serve.{key}={goal if got <= goal else _round(got):g}")
    return 2 * short(best), " ".join(words)


def _tries(question: ServingQuery, way: ServingSplit, target: Target) -> Iterator[ServingOption]:
    """What a way can do for `target`, batch by batch."""
    asked = replace(question, target=target)
    if target.requests_per_second is not None:
        if (found := at_rate(asked, way, target.requests_per_second, way.most_replicas)) is not None:
            yield found
        return
    for batch in batches(question.pins.max_batch, way.most_batch):
        load = Replica(way.model, target.prompt_tokens, target.output_tokens, batch).closed()
        yield ServingOption(way, batch, way.most_replicas, load, target.missed(load.ttft_seconds, load.tpot_seconds))


def _most_rate(question: ServingQuery, way: ServingSplit) -> float:
    """The most requests a second that a way answers in time; 0 where it never does."""
    target = question.target
    capacity = Replica(way.model, target.prompt_tokens, target.output_tokens, way.most_batch).capacity()
    low, high = 0.0, capacity * way.most_replicas
    for _ in range(30):
        middle = (low + high) / 2
        found = at_rate(question, way, middle, way.most_replicas)
        low, high = (middle, high) if found is not None and not found.missed else (low, middle)
    return low if low > high * 1e-6 else 0.0


def _more_devices(question: ServingQuery, ways: list[ServingSplit]) -> int | None:
    """The fewest devices, in whole nodes, that would answer the rate asked for; None where no number does."""
    rate = question.target.requests_per_second
    if not question.server.replicas or rate is None:
        return None
    counts = []
    for way in ways:
        found = rated(question, way, rate, MOST_DEVICES // way.devices)
        if found is not None and not found.missed:
            counts.append(_whole_nodes(found.devices))
    return min(counts, default=None)


def _whole_nodes(devices: int) -> int:
    """`devices` or a few more, so that they come in nodes that tensor parallelism divides: 1, 2, 4, or eights."""
    return 1 << (devices - 1).bit_length() if devices <= 8 else 8 * math.ceil(devices / 8)


def _round(value: float, *, down: bool = False) -> float:
    """To three digits, upwards for a time, downwards for a rate, so that what is offered is met."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    steps = math.floor(value / unit - 1e-9) if down else math.ceil(value / unit + 1e-9)
    return float(f"{steps * unit:.6g}")
