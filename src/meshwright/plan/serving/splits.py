"""Every way to serve: the splits and precisions that fit, and the best batch of each."""

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

#: Without any goal, the smallest batch with this share of the most tokens per second is taken.
ENOUGH = 0.9
#: The least tokens of a slot where its length is not pinned.
LEAST_SLOT_TOKENS = 2048


@dataclass(frozen=True)
class ServingQuery:
    """The question that a serving plan answers. `longest` is the model's own limit of tokens; `cluster_of(tp)` has the
    devices when `tp` of them work together (on a CPU they share cores and memory)."""

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
        """The least tokens of a slot: as pinned, or twice a request."""
        return self.max_len if self.pins.max_len else min(self.max_len, max(LEAST_SLOT_TOKENS, 2 * self.request_tokens))

    def memory(self, model: StepModel, batch: int) -> ServingMemory:
        """The memory of `model` with `batch` of these requests."""
        return serving_memory(model, self.request_tokens, batch, self.max_len, self.slot_tokens)


@dataclass(frozen=True)
class ServingSplit:
    """A split and a precision, before a batch is chosen."""

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
    """A split with its batch and replicas, and the load of a replica. `missed` has the goals that it does not meet."""

    split: ServingSplit
    batch: int
    replicas: int
    load: Load
    missed: tuple[str, ...]

    @property
    def devices(self) -> int:
        return self.split.devices * self.replicas

    @property
    def rate(self) -> float:
        return self.load.requests_per_second * self.replicas


def check(query: ServingQuery) -> None:
    """Raises CannotWork where the requests are longer than the model or the pins allow."""
    if query.pins.max_len is not None and query.pins.max_len > query.longest:
        what = f"{query.pins.max_len} is more than the {query.longest} tokens that the model takes"
        raise CannotWork(Problem("serve.max_len", what, f"nearest: serve.max_len={query.longest}"))
    if query.request_tokens > query.max_len:
        what = f"{query.request_tokens} tokens a request, prompt and answer, but at most {query.max_len} fit"
        least = max(1, query.max_len - query.target.output_tokens)
        room = query.max_len > query.target.output_tokens
        near = f"nearest: serve.prompt_tokens={least}" if room else "nearest: shorter answers"
        raise CannotWork(Problem("serve.prompt_tokens", what, near))


def precisions(query: ServingQuery) -> list[str]:
    """The precisions to try, in order: the pin alone, or the model's own and then those with fewer bits."""
    if query.pins.precision is not None:
        return [query.pins.precision]
    device = query.cluster_of(1).device
    fewer = [
        word
        for word in query.server.precisions
        if WEIGHT_BYTES[word] < WEIGHT_BYTES[query.precision] and computes(device, word)
    ]
    fewer = [word for word in fewer if not (word == "int8" and "fp8" in fewer)]  # the same bytes, slower products
    fewer = [word for word in fewer if not (word == "fp16" and "bf16" in fewer)]
    return [query.precision, *sorted(fewer, key=lambda word: -WEIGHT_BYTES[word])]


def splits_of(query: ServingQuery, precision: str, rejected: list[tuple[str, str]]) -> Iterator[ServingSplit]:
    """Every split that fits; the others go to `rejected`."""
    device = query.cluster_of(1).device
    if precision not in query.server.precisions or not computes(device, precision):
        who = device.name if precision in query.server.precisions else f"the {query.server.name} engine"
        rejected.append((precision, f"{who} has no weights in {precision}"))
        return
    for tp, pp in _degrees(query):
        if reason := _indivisible(query, tp):
            rejected.append((f"tp{tp} pp{pp}", reason))
            continue
        for attention_dp in _attention(query, tp):
            split = _split(query, tp, pp, precision, attention_dp)
            if split.memory.fits and split.most_batch >= 1:
                yield split
            else:
                rejected.append((str(split), _why_not_fit(query, split)))


def _attention(query: ServingQuery, tp: int) -> tuple[bool, ...]:
    """Values of `attention_dp` to try: ranks split attention's heads, or its sequences while they share the experts."""
    if query.pins.attention_dp is not None:
        return (query.pins.attention_dp,)
    return (False, True) if tp > 1 and query.shape.experts and query.server.spreads_attention else (False,)


def _split(query: ServingQuery, tp: int, pp: int, precision: str, attention_dp: bool) -> ServingSplit:
    cluster, server = query.cluster_of(tp), query.server
    cache = 1.0 if precision in ("fp8", "fp4") and "fp8" in cluster.device.flops else None
    model = StepModel(
        query.shape, cluster, server, query.profile,
        tp=tp, pp=pp, precision=precision, cache_bytes=cache, attention_dp=attention_dp,
    )  # fmt: skip
    most = min(query.pins.max_batch or server.most_batch, query.memory(model, 1).sequences)
    memory = query.memory(model, max(1, most))  # a larger batch needs larger buffers, so fewer may fit
    most = min(most, memory.sequences)
    if query.pins.max_batch is not None and most < query.pins.max_batch:
        most = 0
    replicas = max(1, query.devices // (tp * pp)) if server.replicas else 1
    return ServingSplit(model, memory, most, replicas)


def _degrees(query: ServingQuery) -> list[tuple[int, int]]:
    pins, devices = query.pins, query.devices
    per_node = query.cluster_of(1).domain if query.server.replicas else devices
    tps = [pins.tp] if pins.tp else [n for n in range(1, min(devices, per_node) + 1) if per_node % n == 0]
    pps = [pins.pp] if pins.pp else [1, 2, 4, 8, 16] if query.server.pipelines else [1]
    return [(tp, pp) for tp in tps for pp in pps if tp * pp <= devices and pp <= query.shape.layers]


def _indivisible(query: ServingQuery, tp: int) -> str:
    """Why `tp` ranks cannot split the heads; empty where they can."""
    shape = query.shape
    if shape.heads % tp:
        return f"{shape.heads} heads do not divide by {tp}"
    if shape.latent or shape.kv_heads % tp == 0 or (query.server.splits_heads and tp % shape.kv_heads == 0):
        return ""
    return f"{shape.kv_heads} key heads do not divide by {tp}"


def _why_not_fit(query: ServingQuery, split: ServingSplit) -> str:
    memory = split.memory
    if not memory.fits:
        return f"needs {memory.needed / GIB:.1f} GiB a device, {memory.usable / GIB:.1f} may be filled"
    if query.pins.max_batch is not None:
        longest = f" of {memory.longest} tokens" if memory.page_tokens == 0 else ""
        return f"room for {memory.sequences} sequences{longest} beside the weights, {query.pins.max_batch} asked for"
    return "no room for one sequence beside the weights"


def best_of(query: ServingQuery, split: ServingSplit) -> ServingOption | None:
    """The best batch and replicas of a split, with the goals that it misses; None past its capacity."""
    rate = query.target.requests_per_second
    return _without_rate(query, split) if rate is None else fewest_replicas(query, split, rate, split.most_replicas)


def _without_rate(query: ServingQuery, split: ServingSplit) -> ServingOption:
    """All devices kept busy with the batch that gives the most tokens within the times of the target."""
    target, options = query.target, list(busy_options(query, split))
    meeting = [one for one in options if not one.missed]
    if not meeting:
        return min(options, key=lambda one: (excess(target, one), one.batch))
    enough = max(one.rate for one in meeting) * (1.0 if target.goals else ENOUGH)
    return min((one for one in meeting if one.rate >= enough), key=lambda one: one.batch)


def busy_options(query: ServingQuery, split: ServingSplit) -> Iterator[ServingOption]:
    """All replicas of a split kept busy, batch by batch."""
    target = query.target
    for batch in _batches(query.pins.max_batch, split.most_batch):
        load = Replica(split.model, target.prompt_tokens, target.output_tokens, batch).closed()
        yield ServingOption(
            split, batch, split.most_replicas, load, target.missed(load.ttft_seconds, load.tpot_seconds)
        )


def _batches(pinned: int | None, most: int) -> list[int]:
    if pinned is not None:
        return [pinned]
    steps = {step for power in range(most.bit_length()) for step in (2**power, 3 * 2**power // 2)}
    return sorted({*(step for step in steps if step <= most), most})


def fewest_replicas(query: ServingQuery, split: ServingSplit, rate: float, most_replicas: int) -> ServingOption | None:
    """The fewest replicas that meet the target at `rate`; `most_replicas` where none do; None past their capacity."""
    low, high = 1, most_replicas
    best = at_rate(query, split, rate, high)
    if best is None or best.missed:
        return best
    while low < high:
        middle = (low + high) // 2
        option = at_rate(query, split, rate, middle)
        if option is not None and not option.missed:
            high, best = middle, option
        else:
            low = middle + 1
    if query.pins.max_batch is None:
        ample = 1 << max(3, math.ceil(math.log2(2 * best.load.sequences + 1)))
        smaller = at_rate(query, split, rate, best.replicas, min(ample, split.most_batch))
        best = smaller if smaller is not None and not smaller.missed else best
    return best


def at_rate(
    query: ServingQuery, split: ServingSplit, rate: float, replicas: int, batch: int | None = None
) -> ServingOption | None:
    """`replicas` that share requests at `rate` in all; None past their capacity."""
    target = query.target
    batch = batch or split.most_batch
    load = Replica(split.model, target.prompt_tokens, target.output_tokens, batch).open(rate / replicas)
    if load is None:
        return None
    return ServingOption(split, batch, replicas, load, target.missed(load.ttft_seconds, load.tpot_seconds))


def excess(target: Target, option: ServingOption) -> float:
    """The largest ratio of a time to its goal, at least 1."""
    pairs = ((option.load.ttft_seconds, target.ttft_seconds), (option.load.tpot_seconds, target.tpot_seconds))
    return max([1.0, *(value / most for value, most in pairs if most is not None)])


def missed_words(target: Target, option: ServingOption) -> str:
    words = {
        "ttft_seconds": f"first token after {option.load.ttft_seconds:.3g} s",
        "tpot_seconds": f"{option.load.tpot_seconds:.3g} s a token",
    }
    return ", ".join(f"{words[key]}, at most {getattr(target, key):g} wanted" for key in option.missed)
