"""The best way to serve that meets the target, and why the others lost.

With a rate, the fewest devices win, then the fewest seconds per token. Without a rate, the most tokens per second; with
no goal at all, the quickest answers at nine tenths of the most tokens per second. Weights get fewer bits than the
model's own only where nothing else meets the target, since that may change the answers.
"""

from __future__ import annotations

from meshwright.errors import CannotWork
from meshwright.plan.reliability import price_of
from meshwright.plan.result import Interval
from meshwright.plan.serving.result import BINDING, ServingChoice, ServingFigures, ServingPlan
from meshwright.plan.serving.splits import (
    ENOUGH,
    ServingOption,
    ServingQuery,
    ServingSplit,
    best_of,
    check,
    missed_words,
    precisions,
    splits_of,
)
from meshwright.plan.serving.suggest import nearest_fit, nearest_target
from meshwright.plan.serving.work import parameter_count

RUNNERS_UP = 4
#: The source of the speeds, by kind of device.
_SPEED_SOURCES = {
    "cuda": "speeds from data sheets and published microbenchmarks: no engine was measured on these devices",
    "cpu": "speeds of small pieces of work timed on one machine",
}
#: Among splits that give at least this share of the best rate, the one with the fewest devices wins.
ALIKE = 0.99


def make_serving_plan(query: ServingQuery) -> ServingPlan:
    """The best way to serve. Raises CannotWork, with the nearest that works, where none fits or meets the target."""
    check(query)
    rejected: list[tuple[str, str]] = []
    splits: list[ServingSplit] = []
    for precision in precisions(query):
        options: list[ServingOption] = []
        for split in splits_of(query, precision, rejected):
            splits.append(split)
            option = best_of(query, split)
            if option is None:
                rejected.append((str(split), "requests come faster than all devices together can answer"))
            elif option.missed:
                rejected.append((str(split), missed_words(query.target, option)))
            else:
                options.append(option)
        if options:
            return _plan(query, options, rejected)
    raise CannotWork(nearest_target(query, splits) if splits else nearest_fit(query, rejected))


def _plan(query: ServingQuery, options: list[ServingOption], rejected: list[tuple[str, str]]) -> ServingPlan:
    if query.target.requests_per_second is not None:
        ranked = sorted(options, key=lambda one: (one.devices, one.load.tpot_seconds, one.split.devices))
    else:
        goals = query.target.goals
        enough = max(one.rate for one in options) * (ALIKE if goals else ENOUGH)
        close = [one for one in options if one.rate >= enough]
        first = min(
            close, key=lambda one: (one.split.devices if goals else 0, one.load.tpot_seconds, one.split.devices)
        )
        ranked = [first, *sorted((one for one in options if one is not first), key=lambda one: -one.rate)]
    chosen = ranked[0]
    cluster = query.cluster_of(chosen.split.model.tp)
    assumed = [_SPEED_SOURCES[chosen.split.model.kind], *cluster.assumed]
    if chosen.split.model.precision != precisions(query)[0]:
        words = f"weights in {chosen.split.model.precision}, since {query.precision} does not meet the target: "
        assumed.append(words + "compare the answers before you rely on them")
    if chosen.split.model.cache_bytes < chosen.split.model.wide_bytes:
        assumed.append("keys and values in fp8, as the weights")
    if chosen.split.model.widens:
        rows = query.server.widens_rows
        assumed.append(f"bf16 products are slow on this CPU: steps of {rows} rows and more, as of prompts, are in fp32")
    return ServingPlan(
        chosen=_choice(query, chosen, _why(query, chosen)),
        runners_up=tuple(_choice(query, one, _why_lost(query, one, chosen)) for one in ranked[1 : 1 + RUNNERS_UP]),
        rejected=tuple(rejected),
        assumed=tuple(dict.fromkeys(assumed)),
        target=query.target,
        model=f"{query.shape.hf_type or 'decoder'} {query.shape.layers}x{query.shape.hidden}",
        parameters=parameter_count(query.shape),
        cluster=str(cluster),
        engine=query.server.name,
    )


def _choice(query: ServingQuery, option: ServingOption, why: str) -> ServingChoice:
    model, load, rate = option.split.model, option.load, option.rate
    memory = query.memory(model, option.batch)
    mixture = "mixture" if query.shape.experts else "dense"
    tokens = rate * query.target.output_tokens
    price = price_of(query.cluster_of(model.tp))
    dollars = None if price is None else option.devices * price.dollars_per_hour / 3600 / tokens * 1e6

    def spread(value: float, what: str) -> Interval:
        low, high = query.profile.interval("serving", model.kind, what, mixture)
        return Interval(value * low, value, value * high)

    # A rate that is asked for is served exactly; only the capacity is uncertain.
    exact = query.target.requests_per_second is not None
    figures = ServingFigures(
        ttft_seconds=spread(load.ttft_seconds, "ttft"),
        tpot_seconds=spread(load.tpot_seconds, "tpot"),
        tokens_per_second=Interval(tokens, tokens, tokens) if exact else spread(tokens, "throughput"),
        requests_per_second=Interval(rate, rate, rate) if exact else spread(rate, "throughput"),
        dollars_per_million_tokens=dollars,
        sequences=load.sequences,
        utilisation=load.utilisation,
    )
    return ServingChoice(
        tp=model.tp,
        pp=model.pp,
        replicas=option.replicas,
        attention_dp=model.attention_dp,
        precision=model.precision,
        max_batch=option.batch,
        max_len=memory.longest,
        memory=memory,
        predicted=figures,
        breakdown=dict(load.parts),
        binding=_binding(option),
        why=why,
    )


def _binding(option: ServingOption) -> str:
    """The part of the time between two tokens that takes longest."""
    return max(BINDING, key=lambda part: option.load.parts[part])


def _time_spent(option: ServingOption) -> str:
    part, parts = _binding(option), option.load.parts
    return f"{BINDING[part]} takes {parts[part] / sum(parts.values()):.0%} of the time of a token"


def _why(query: ServingQuery, option: ServingOption) -> str:
    spent = _time_spent(option)
    if query.target.requests_per_second is None:
        if query.target.goals:
            return f"the most tokens a second of what meets the target; {spent}"
        return f"within a tenth of the most tokens a second, and of those the quickest to each caller; {spent}"
    return f"the fewest devices that answer {option.rate:g} requests a second in time; {spent}"


def _why_lost(query: ServingQuery, option: ServingOption, chosen: ServingOption) -> str:
    spent, longer = _time_spent(option), option.load.tpot_seconds / chosen.load.tpot_seconds - 1
    if query.target.requests_per_second is not None:
        if option.devices > chosen.devices:
            return f"{option.devices} devices instead of {chosen.devices}; {spent}"
        return f"{longer:.0%} longer a token; {spent}"
    if option.rate > chosen.rate:
        return f"{option.rate / chosen.rate - 1:.0%} more tokens a second, but {longer:.0%} longer a token; {spent}"
    return f"{1 - option.rate / chosen.rate:.0%} fewer tokens a second; {spent}"
