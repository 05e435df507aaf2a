"""Takes the best way to serve that meets the target, and says why the others lost.

With a rate to meet, the fewest devices win, then the fewest seconds a token. Without one, the most tokens a second;
where no time is wanted either, the quickest answers that still give nine tenths of them. Weights are taken in fewer
bits than the model's own only where nothing else meets the target, since that may change the answers.
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
#: What a plan's speeds come from, by kind of device.
_SUPPOSED = {
    "cuda": "speeds from data sheets and published microbenchmarks: no engine was measured on these devices",
    "cpu": "speeds of small pieces of work timed on one machine",
}
#: Ways within this share of each other answer alike: the simpler is taken.
ALIKE = 0.99


def make_serving_plan(question: ServingQuery) -> ServingPlan:
    """The best way to serve. Raises CannotWork, naming what would work, where none fits or none meets the target."""
    check(question)
    rejected: list[tuple[str, str]] = []
    ways: list[ServingSplit] = []
    reduced = False
    for precision in precisions(question):
        met: list[ServingOption] = []
        for way in splits_of(question, precision, rejected):
            ways.append(way)
            found = best_of(question, way)
            if found is None:
                rejected.append((str(way), "requests come faster than all devices together can answer"))
            elif found.missed:
                rejected.append((str(way), missed_words(question.target, found)))
            else:
                met.append(found)
        if met:
            return _plan(question, met, rejected, reduced)
        reduced = True
    raise CannotWork(nearest_target(question, ways) if ways else nearest_fit(question, rejected))


def _plan(
    question: ServingQuery, met: list[ServingOption], rejected: list[tuple[str, str]], reduced: bool
) -> ServingPlan:
    if question.target.requests_per_second is not None:
        ranked = sorted(met, key=lambda one: (one.devices, one.load.tpot_seconds, one.way.devices))
    else:
        goals = question.target.goals
        enough = max(one.rate for one in met) * (ALIKE if goals else ENOUGH)
        close = [one for one in met if one.rate >= enough]
        first = min(close, key=lambda one: (one.way.devices if goals else 0, one.load.tpot_seconds, one.way.devices))
        ranked = [first, *sorted((one for one in met if one is not first), key=lambda one: -one.rate)]
    chosen = ranked[0]
    cluster = question.cluster_of(chosen.way.model.tp)
    assumed = [_SUPPOSED[chosen.way.model.kind], *cluster.assumed]
    if reduced:
        words = f"weights in {chosen.way.model.precision}, since {question.precision} does not meet the target: "
        assumed.append(words + "compare the answers before you rely on them")
    if chosen.way.model.cache_bytes < chosen.way.model.wide_bytes:
        assumed.append("keys and values in fp8, as the weights")
    return ServingPlan(
        chosen=_choice(question, chosen, _why(question, chosen)),
        runners_up=tuple(_choice(question, one, _lost(question, one, chosen)) for one in ranked[1 : 1 + RUNNERS_UP]),
        rejected=tuple(rejected),
        assumed=tuple(dict.fromkeys(assumed)),
        target=question.target,
        model=f"{question.shape.hf_type or 'decoder'} {question.shape.layers}x{question.shape.hidden}",
        parameters=parameter_count(question.shape),
        cluster=str(cluster),
        engine=question.server.name,
    )


def _choice(question: ServingQuery, found: ServingOption, why: str) -> ServingChoice:
    way, load = found.way, found.load
    memory = question.memory(way.model, found.batch)
    kind = way.model.kind
    mixture = "mixture" if question.shape.experts else "dense"
    tokens = found.rate * question.target.output_tokens
    price = price_of(question.cluster_of(way.model.tp))
    dollars = None if price is None else found.devices * price.dollars_per_hour / 3600 / tokens * 1e6

    def spread(value: float, what: str) -> Interval:
        low, high = question.profile.interval("serving", kind, what, mixture)
        return Interval(value * low, value, value * high)

    # A rate that was asked for is given out as it comes; what may be off is how much there would be room for.
    sure = question.target.requests_per_second is not None
    figures = ServingFigures(
        ttft_seconds=spread(load.ttft_seconds, "ttft"),
        tpot_seconds=spread(load.tpot_seconds, "tpot"),
        tokens_per_second=Interval(tokens, tokens, tokens) if sure else spread(tokens, "throughput"),
        requests_per_second=Interval(found.rate, found.rate, found.rate) if sure else spread(found.rate, "throughput"),
        dollars_per_million_tokens=dollars,
        sequences=load.sequences,
        utilisation=load.utilisation,
    )
    binding = max(BINDING, key=lambda part: load.parts[part])
    return ServingChoice(
        tp=way.model.tp,
        pp=way.model.pp,
        replicas=found.replicas,
        attention_dp=way.model.attention_dp,
        precision=way.model.precision,
        max_batch=found.batch,
        max_len=memory.longest,
        memory=memory,
        predicted=figures,
        breakdown=dict(load.parts),
        binding=binding,
        why=why,
    )


def _why(question: ServingQuery, found: ServingOption) -> str:
    part = max(BINDING, key=lambda name: found.load.parts[name])
    share = found.load.parts[part] / sum(found.load.parts.values())
    spent = f"{BINDING[part]} takes {share:.0%} of the time of a token"
    if question.target.requests_per_second is None:
        if question.target.goals:
            return f"the most tokens a second of what meets the target; {spent}"
        return f"within a tenth of the most tokens a second, and of those the quickest to each caller; {spent}"
    return f"the fewest devices that answer {found.rate:g} requests a second in time; {spent}"


def _lost(question: ServingQuery, found: ServingOption, chosen: ServingOption) -> str:
    part = max(BINDING, key=lambda name: found.load.parts[name])
    share = found.load.parts[part] / sum(found.load.parts.values())
    spent = f"{BINDING[part]} takes {share:.0%} of the time of a token"
    if question.target.requests_per_second is not None:
        if found.devices > chosen.devices:
            return f"{found.devices} devices instead of {chosen.devices}; {spent}"
        return f"{found.load.tpot_seconds / chosen.load.tpot_seconds - 1:.0%} longer a token; {spent}"
    if found.rate > chosen.rate:
        longer = found.load.tpot_seconds / chosen.load.tpot_seconds - 1
        return f"{found.rate / chosen.rate - 1:.0%} more tokens a second, but {longer:.0%} longer a token; {spent}"
    return f"{1 - found.rate / chosen.rate:.0%} fewer tokens a second; {spent}"
