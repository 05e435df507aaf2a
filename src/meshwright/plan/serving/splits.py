"""Every way to serve that there is: splits and precisions that fit, and the batch with which each does best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from meshwright.cluster import GIB, Cluster
from meshwright.errors import CannotWork, Problem
from meshwright.families.decoder_shape import DecoderShape
from meshwright.plan.constants import Profile
from meshwright.plan.serving.load import Load, Replica
from meshwright.plan.serving.memory import ServingMemory, serving_memory
from meshwright.plan.serving.result import ServingPins, Target
from meshwright.plan.serving.time import WEIGHT_BYTES, Server, StepModel, computes

#: Without any goal, a batch is large enough once it gives this share of the most tokens a second.
ENOUGH = 0.9
#: Room for a sequence, where each has one slot and nobody says how long it may get.
LEAST_SLOT_TOKENS = 2048


@dataclass(frozen=True)
class ServingQuery:
    """All that a serving plan is made from. `longest` is the model's own limit of tokens; `cluster_of(tp)` what the
    devices are when `tp` of them work together (on a CPU they share cores and memory)."""

    shape: DecoderShape
    cluster_of: Callable[[int], Cluster]
    devices: int
    server: Server
    profile: Profile
    target: Target
    pins: ServingPins
    precision: str
    longest: int

    @property
    def max_len(self) -> int:
        return min(self.longest, self.pins.max_len or self.longest)

    @property
    def request_tokens(self) -> int:
        return self.target.prompt_tokens + self.target.output_tokens

    @property
    def slot_tokens(self) -> int:
        """What a sequence has room for at least, where each has one slot: as long as asked for, or twice the usual."""
        return self.max_len if self.pins.max_len else min(self.max_len, max(LEAST_SLOT_TOKENS, 2 * self.request_tokens))

    def memory(self, model: StepModel, batch: int) -> ServingMemory:
        """What `model` holds for `batch` of these requests."""
        return serving_memory(model, self.request_tokens, batch, self.max_len, self.slot_tokens)


@dataclass(frozen=True)
class ServingSplit:
    """A split and a precision that fit, before a batch is chosen."""

    model: StepModel
    memory: ServingMemory
    most_batch: int
    most_replicas: int

    @property
    def devices(self) -> int:
        return self.model.tp * self.model.pp

    def __str__(self) -> str:
        spread = " attention-dp" if self.model.attention_dp else ""
        return f"tp{self.model.tp} pp{self.model.pp}{spread} {self.model.precision}"


@dataclass(frozen=True)
class ServingOption:
    """A way with its batch and replicas, and what a replica does then. `missed` are the goals it does not meet."""

    way: ServingSplit
    batch: int
    replicas: int
    load: Load
    missed: tuple[str, ...]

    @property
    def devices(self) -> int:
        return self.way.devices * self.replicas

    @property
    def rate(self) -> float:
        return self.load.requests_per_second * self.replicas


def check(question: ServingQuery) -> None:
    if question.pins.max_len is not None and question.pins.max_len > question.longest:
        what = f"{question.pins.max_len} is past the {question.longest} tokens that the model does"
        raise CannotWork(Problem("serve.max_len", what, f"nearest: serve.max_len={question.longest}"))
    if question.request_tokens > question.max_len:
        what = f"{question.request_tokens} tokens a request, prompt and answer, but at most {question.max_len} fit"
        least = max(1, question.max_len - question.target.output_tokens)
        room = question.max_len > question.target.output_tokens
        near = f"nearest: serve.prompt_tokens={least}" if room else "nearest: shorter answers"
        raise CannotWork(Problem("serve.prompt_tokens", what, near))


def precisions(question: ServingQuery) -> list[str]:
    """Those to try, in order: the one asked for alone, or the model's own and then fewer bits."""
    if question.pins.precision is not None:
        return [question.pins.precision]
    device = question.cluster_of(1).device
    fewer = [
        word
        for word in question.server.precisions
        if WEIGHT_BYTES[word] < WEIGHT_BYTES[question.precision] and computes(device, word)
    ]
    fewer = [word for word in fewer if not (word == "int8" and "fp8" in fewer)]  # the same bytes, slower products
    fewer = [word for word in fewer if not (word == "fp16" and "bf16" in fewer)]
    return [question.precision, *sorted(fewer, key=lambda word: -WEIGHT_BYTES[word])]


def splits_of(question: ServingQuery, precision: str, rejected: list[tuple[str, str]]) -> Iterator[ServingSplit]:
    """Every split that fits, with the room it leaves; the others go to `rejected`."""
    device = question.cluster_of(1).device
    if precision not in question.server.precisions or not computes(device, precision):
        who = device.name if precision in question.server.precisions else f"the {question.server.name} engine"
        rejected.append((precision, f"{who} has no weights in {precision}"))
        return
    for tp, pp in _degrees(question):
        if reason := _indivisible(question, tp):
            rejected.append((f"tp{tp} pp{pp}", reason))
            continue
        for attention_dp in _attention(question, tp):
            way = _split(question, tp, pp, precision, attention_dp)
            if way.memory.fits and way.most_batch >= 1:
                yield way
            else:
                rejected.append((str(way), _misfit(question, way)))


def _attention(question: ServingQuery, tp: int) -> tuple[bool, ...]:
    """Whether ranks split attention's heads, or its sequences while they share the experts."""
    if question.pins.attention_dp is not None:
        return (question.pins.attention_dp,)
    return (False, True) if tp > 1 and question.shape.experts and question.server.spreads_attention else (False,)


def _split(question: ServingQuery, tp: int, pp: int, precision: str, attention_dp: bool) -> ServingSplit:
    cluster, server = question.cluster_of(tp), question.server
    cache = 1.0 if precision in ("fp8", "fp4") and "fp8" in cluster.device.flops else None
    model = StepModel(
        question.shape,
        cluster,
        server,
        question.profile,
        tp=tp,
        pp=pp,
        precision=precision,
        cache_bytes=cache,
        attention_dp=attention_dp,
    )
    goals = question.pins.max_batch or server.most_batch
    most = min(goals, question.memory(model, 1).sequences)
    memory = question.memory(model, max(1, most))  # what more sequences work in leaves fewer room
    most = min(most, memory.sequences)
    if question.pins.max_batch is not None and most < question.pins.max_batch:
        most = 0
    replicas = max(1, question.devices // (tp * pp)) if server.replicas else 1
    return ServingSplit(model, memory, most, replicas)


def _degrees(question: ServingQuery) -> list[tuple[int, int]]:
    pins, devices = question.pins, question.devices
    per_node = question.cluster_of(1).domain if question.server.replicas else devices
    tps = [pins.tp] if pins.tp else [n for n in range(1, min(devices, per_node) + 1) if per_node % n == 0]
    pps = [pins.pp] if pins.pp else [1, 2, 4, 8, 16] if question.server.pipelines else [1]
    return [(tp, pp) for tp in tps for pp in pps if tp * pp <= devices and pp <= question.shape.layers]


def _indivisible(question: ServingQuery, tp: int) -> str:
    """Why heads cannot be split `tp` ways; empty where they can."""
    shape = question.shape
    if shape.heads % tp:
        return f"{shape.heads} heads do not divide by {tp}"
    if shape.latent or shape.kv_heads % tp == 0 or (question.server.splits_heads and tp % shape.kv_heads == 0):
        return ""
    return f"{shape.kv_heads} key heads do not divide by {tp}"


def _misfit(question: ServingQuery, way: ServingSplit) -> str:
    memory = way.memory
    if not memory.fits:
        return f"needs {memory.needed / GIB:.1f} GiB a device, {memory.usable / GIB:.1f} may be filled"
    if question.pins.max_batch is not None:
        longest = f" of {memory.longest} tokens" if memory.page_tokens == 0 else ""
        return f"room for {memory.sequences} sequences{longest} beside the weights, {question.pins.max_batch} asked for"
    return "no room for one sequence beside the weights"


def best_of(question: ServingQuery, way: ServingSplit) -> ServingOption | None:
    """The batch and replicas with which a way does best; what misses the target is told so."""
    rate = question.target.requests_per_second
    return _busy(question, way) if rate is None else rated(question, way, rate, way.most_replicas)


def _busy(question: ServingQuery, way: ServingSplit) -> ServingOption:
    """No rate: all devices kept busy, the batch for the most tokens within the times wanted."""
    target, options = question.target, []
    for batch in batches(question.pins.max_batch, way.most_batch):
        load = Replica(way.model, target.prompt_tokens, target.output_tokens, batch).closed()
        options.append(
            ServingOption(way, batch, way.most_replicas, load, target.missed(load.ttft_seconds, load.tpot_seconds))
        )
    met = [one for one in options if not one.missed]
    if not met:
        return min(options, key=lambda one: (excess(target, one), one.batch))
    best = max(one.rate for one in met)
    enough = best * (1.0 if target.goals else ENOUGH)
    return min((one for one in met if one.rate >= enough), key=lambda one: one.batch)


def batches(pinned: int | None, most: int) -> list[int]:
    if pinned is not None:
        return [pinned]
    steps = {step for power in range(most.bit_length()) for step in (2**power, 3 * 2**power // 2)}
    return sorted({*(step for step in steps if step <= most), most})


def rated(question: ServingQuery, way: ServingSplit, rate: float, most_replicas: int) -> ServingOption | None:
    """The fewest replicas that meet the target at `rate`; the most there are where none do; None past any capacity."""
    low, high = 1, most_replicas
    best = at_rate(question, way, rate, high)
    if best is None or best.missed:
        return best
    while low < high:
        middle = (low + high) // 2
        tried = at_rate(question, way, rate, middle)
        if tried is not None and not tried.missed:
            high, best = middle, tried
        else:
            low = middle + 1
    if question.pins.max_batch is None:
        ample = 1 << max(3, math.ceil(math.log2(2 * best.load.sequences + 1)))
        smaller = at_rate(question, way, rate, best.replicas, min(ample, way.most_batch))
        best = smaller if smaller is not None and not smaller.missed else best
    return best


def at_rate(
    question: ServingQuery, way: ServingSplit, rate: float, replicas: int, batch: int | None = None
) -> ServingOption | None:
    target = question.target
    batch = batch or way.most_batch
    load = Replica(way.model, target.prompt_tokens, target.output_tokens, batch).open(rate / replicas)
    if load is None:
        return None
    return ServingOption(way, batch, replicas, load, target.missed(load.ttft_seconds, load.tpot_seconds))


def excess(target: Target, found: ServingOption) -> float:
    """By how much the times wanted are missed: the largest ratio."""
    pairs = ((found.load.ttft_seconds, target.ttft_seconds), (found.load.tpot_seconds, target.tpot_seconds))
    return max([1.0, *(value / most for value, most in pairs if most is not None)])


def missed_words(target: Target, found: ServingOption) -> str:
    words = {
        "ttft_seconds": f"first token after {found.load.ttft_seconds:.3g} s",
        "tpot_seconds": f"{found.load.tpot_seconds:.3g} s a token",
    }
    return ", ".join(f"{words[key]}, at most {getattr(target, key):g} wanted" for key in found.missed)
