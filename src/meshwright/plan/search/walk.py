"""The walk through a Space: layouts that fit, layouts that are too large, and layouts that a bound shows to be beaten.

Four shortcuts save estimates without losing the best layout (a test compares with `all_estimates`, the slow twin):
more recompute only costs time, so it is used only as far as needed; a layout that does not fit at its leanest does not
fit with a larger micro-batch or a smaller shard either, and memory is counted before time; no step is shorter than its
micro-batches take to pass the stages, so a layout that is slower than the best by that bound is left out; a layout
whose busiest rank alone is slower than another layout of the same degrees is not replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from meshwright.layout import Layout
from meshwright.plan.cost import Estimate, Estimator, usable_bytes
from meshwright.plan.pipeline import TABLE
from meshwright.plan.search.space import (
    DEGREES,
    NARROW,
    USUAL,
    WHOLE,
    Bounds,
    Space,
    base_layouts,
    degrees_of,
    layouts,
    micro_batch_sizes,
    size,
)

#: A simpler layout wins over one predicted to be faster by less than this share. On 68 groups of measured layouts this
#: pick is as quick as the one predicted quickest, up to 5 % (docs/predict.md).
TIE = 0.03
#: Spaces of more layouts than this, before the rules, are searched within tighter bounds.
MOST_LAYOUTS = {"whole": 15_000, "usual": 60_000}
#: A layout whose step takes at least this many times the best one so far is not estimated: it would be no runner-up.
CUTOFF = 1.25
#: The number of sets of degrees that are searched again, more finely, after a search within bounds.
REFINED = 4
REFINEMENT = replace(USUAL, name="refinement", sequence_off=True)

Value = Callable[[Estimate], float]


def step_seconds(estimate: Estimate) -> float:
    """The value to minimise with the objective "time"."""
    return estimate.step_seconds


@dataclass(frozen=True)
class OversizedLayout:
    """A layout that does not fit, its peak memory, and a lower bound of its step."""

    peak_bytes: int
    least_seconds: float
    layout: Layout


@dataclass
class SearchResult:
    """The result of a search.

    `counts`: each layout of the "space" was "estimated" (of these, "missed" did not fit), "pruned" by a bound,
    "costlier" than one that fits, or "too_large" because a leaner one was. `fitting` has the best layouts that fit of
    each set of degrees, `near_misses` the leanest of each set without one that fits, `too_large` all layouts whose
    memory was counted and does not fit.
    """

    fitting: list[Estimate] = field(default_factory=list)
    near_misses: list[OversizedLayout] = field(default_factory=list)
    too_large: list[OversizedLayout] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bounds: Bounds = WHOLE

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number


def complexity(layout: Layout) -> int:
    """How complicated a layout is; of layouts that tie, the simplest wins."""
    return (
        4 * (layout.pp > 1) + 3 * (layout.tp > 1) + 3 * (layout.cp > 1) + 2 * (layout.ep > 1) + (layout.shard > 1)
        + (layout.recompute != "none") + 2 * (layout.vpp > 1) + (layout.schedule != "1f1b") + 2 * layout.offload
    )  # fmt: skip


def order_key(estimate: Estimate) -> tuple[float, int, str]:
    return estimate.step_seconds, estimate.peak_bytes, _tie_break(estimate.layout)


def _tie_break(layout: Layout) -> str:
    return " ".join(map(str, layout.as_dict().values()))


def ranked(estimates: list[Estimate], value: Value = step_seconds, least: float = float("inf")) -> list[Estimate]:
    """Estimates in order of `value`, except that those within TIE of the best (or of `least`) are ordered by simplicity
    first."""
    order = sorted(estimates, key=lambda e: (value(e), e.peak_bytes))
    if not order:
        return order
    limit = min(least, value(order[0])) * (1 + TIE)
    tied = [e for e in order if value(e) <= limit]
    tied.sort(key=lambda e: (complexity(e.layout), value(e), e.peak_bytes, _tie_break(e.layout)))
    return tied + order[len(tied) :]


def best_of_each(estimates: Iterable[Estimate]) -> list[Estimate]:
    """The quickest of each set of degrees, and all within TIE of the quickest of all, which may be simpler."""
    order, degree_sets = sorted(estimates, key=order_key), set()
    best = []
    for estimate in order:
        degrees = degrees_of(estimate.layout)
        if degrees not in degree_sets or estimate.step_seconds <= order[0].step_seconds * (1 + TIE):
            degree_sets.add(degrees)
            best.append(estimate)
    return best


def bounded(space: Space) -> Space:
    """The space in the widest bounds that can be searched in a moment."""
    for bounds in (WHOLE, USUAL):
        within = replace(space, bounds=bounds)
        if size(within, MOST_LAYOUTS[bounds.name] + 1) <= MOST_LAYOUTS[bounds.name]:
            return within
    return replace(space, bounds=NARROW)


def search(space: Space, estimator: Estimator) -> SearchResult:
    """Searches a large space within bounds, then finely around the best; within wider bounds where nothing fits."""
    within = bounded(space)
    result = explore(within, estimator)
    if within.bounds is WHOLE:
        return result
    if not result.fitting:
        for bounds in (USUAL, replace(USUAL, name="wide", tensor_across_nodes=True, least_tokens=256)):
            wider = explore(replace(space, bounds=bounds), estimator)
            if wider.fitting:
                return _refine(space, estimator, wider)
            result = wider if wider.near_misses else result
        return result
    return _refine(space, estimator, result)


def _refine(space: Space, estimator: Estimator, result: SearchResult) -> SearchResult:
    """Searches the best sets of degrees again, with every shard degree, schedule and depth of the whole space."""
    best = {e.layout: e for e in result.fitting}
    searched: set[tuple[object, ...]] = set()
    seconds = min(e.step_seconds for e in result.fitting)
    for estimate in ranked(result.fitting):
        degrees = {name: getattr(estimate.layout, name) for name in DEGREES if name != "shard"}
        if tuple(degrees.values()) in searched:
            continue
        searched.add(tuple(degrees.values()))
        finer = replace(space, pins={**degrees, **space.pins}, bounds=REFINEMENT)
        near = explore(finer, estimator, cutoff=1 + 2 * TIE, best_seconds=seconds)
        seconds = min([seconds, *(e.step_seconds for e in near.fitting)])
        best.update({e.layout: e for e in near.fitting})
        for name, number in near.counts.items():
            result.count(name, number)
        if len(searched) == REFINED:
            break
    result.fitting = best_of_each(best.values())
    return result


def explore(
    space: Space, estimator: Estimator, *, cutoff: float = CUTOFF, best_seconds: float = float("inf")
) -> SearchResult:
    """The fastest layouts that fit of each set of degrees (`best_of_each`), or the one that misses by least. May leave
    out a layout that takes `cutoff` times the best, or times `best_seconds`, the step of an earlier layout."""
    walk = _Walk(space, estimator, cutoff, best_seconds)
    order = []
    for place, base in enumerate(base_layouts(space)):
        sizes = micro_batch_sizes(space, base)
        floor = min(walk.floor(replace(base, micro_batch=micro)) for micro in sizes)
        order.append((floor, place, base, sizes))
    for _, _, base, sizes in sorted(order, key=lambda entry: entry[:2]):  # quickest first: prunes the rest
        walk.visit(base, sizes)
    return walk.end()


class _Walk:
    """A search through the base layouts of a space, and what it knows so far."""

    def __init__(self, space: Space, estimator: Estimator, cutoff: float, best_seconds: float) -> None:
        self.space, self.estimator, self.cutoff = space, estimator, cutoff
        self.room = usable_bytes(space.workload.cluster.device)
        self.result = SearchResult(bounds=space.bounds)
        self.best_seconds = best_seconds
        self.fitting: dict[tuple[int, ...], list[Estimate]] = {}
        self.quickest: dict[tuple[int, ...], float] = {}  # seconds of the best of each set of degrees so far
        self.near_misses: dict[tuple[int, ...], OversizedLayout] = {}
        self.floors: dict[tuple[object, ...], float] = {}
        self.misfits: dict[tuple[object, ...], list[tuple[int, int]]] = {}  # (micro-batch, shard) that do not fit
        self.recomputes, self.offloads = space.recomputes(), space.offloads()
        self.variants = len(self.recomputes) * len(self.offloads)

    def visit(self, base: Layout, sizes: list[int]) -> None:
        """Tries every micro-batch of a base layout, ascending, each with the least recompute and offload that fits."""
        degrees = degrees_of(base)
        for micro in sizes:
            self.result.count("space", self.variants)
            self._try_recomputes(replace(base, micro_batch=micro), degrees)

    def _try_recomputes(self, base: Layout, degrees: tuple[int, ...]) -> None:
        """Tries a micro-batch without recompute, then with more and more of it; then the same with offload."""
        estimated = pruned = too_large = 0
        for offload in self.offloads:
            for place, recompute in enumerate(self.recomputes):
                layout = replace(base, recompute=recompute, offload=offload)
                floor = self.floor(layout)
                if floor > self.cutoff * self.best_seconds:
                    pruned += len(self.recomputes) - place
                    break
                if self._cannot_fit(layout):
                    too_large += 1
                    continue
                peak_bytes = self.estimator.peak_bytes(layout)
                if peak_bytes <= self.room:
                    if self._is_beaten(layout, degrees):
                        pruned += 1
                    else:
                        estimated += 1
                        self._add_fit(self.estimator.estimate(layout), degrees)
                    break
                estimated += 1
                self._add_miss(OversizedLayout(peak_bytes, floor, layout), degrees)
            else:
                continue  # nothing fits with this offload
            if place == 0:  # fits, or is too slow, without recompute: offload would only cost time
                break
        counts = {"estimated": estimated, "pruned": pruned, "too_large": too_large}
        for name, number in (*counts.items(), ("costlier", self.variants - sum(counts.values()))):
            self.result.count(name, number)

    def _cannot_fit(self, layout: Layout) -> bool:
        """Whether a comparable layout with no larger a micro-batch and no smaller a shard did not fit."""
        if layout.pp == 1 and not self._accumulates(layout):
            return False
        key = _misfit_key(layout)
        return any(
            micro <= layout.micro_batch and shard >= layout.shard
            for one in {key, (*key[:-1], True)}  # without sequence parallelism a layout needs no less
            for micro, shard in self.misfits.get(one, ())
        )

    def _accumulates(self, layout: Layout) -> bool:
        return layout.micro_batches(self.space.workload.global_batch) > 1

    def _is_beaten(self, layout: Layout, degrees: tuple[int, ...]) -> bool:
        """Whether another layout of the same degrees is quicker than this can be, by more than a tie."""
        quickest = self.quickest.get(degrees)
        return quickest is not None and self.estimator.least_seconds(layout) > quickest * (1 + TIE)

    def _add_fit(self, estimate: Estimate, degrees: tuple[int, ...]) -> None:
        self.fitting.setdefault(degrees, []).append(estimate)
        seconds = estimate.step_seconds
        self.quickest[degrees] = min(seconds, self.quickest.get(degrees, seconds))
        self.best_seconds = min(self.best_seconds, seconds)

    def _add_miss(self, miss: OversizedLayout, degrees: tuple[int, ...]) -> None:
        self.result.count("missed")
        layout = miss.layout
        # With gradient accumulation all memory grows with the micro-batch. In a pipeline, fewer micro-batches may leave
        # smaller gradients, so the rest must be too large without them.
        if self._accumulates(layout) if layout.pp == 1 else self.estimator.least_bytes(layout) > self.room:
            self.misfits.setdefault(_misfit_key(layout), []).append((layout.micro_batch, layout.shard))
        self.result.too_large.append(miss)
        nearest = self.near_misses.get(degrees)
        if nearest is None or miss.peak_bytes < nearest.peak_bytes:
            self.near_misses[degrees] = miss

    def floor(self, layout: Layout) -> float:
        """A lower bound of a step's seconds. One micro-batch takes `whole` seconds through all blocks if nothing is
        sharded over data parallelism. Some rank does its share of that m times. A rank of whole stages also waits for
        the stages before it, at the start and, for their backwards, at the end: with stage times c, the step takes
        M = max over s of (sum of c before s) + m c_s, so c_s <= (M - sum) / m, and the sum of all c is at most
        M (1 - (1 - 1 / m) ** pp). With split backwards or virtual stages, the waits may be shorter."""
        batch = self.space.workload.global_batch
        key = (layout.tp, layout.cp, layout.ep, layout.sequence_parallel, layout.micro_batch, layout.recompute)
        if key not in self.floors:
            alone = Layout(
                tp=layout.tp,
                cp=layout.cp,
                ep=layout.ep,
                dp=layout.ep,
                sequence_parallel=layout.sequence_parallel,
                micro_batch=layout.micro_batch,
                recompute=layout.recompute,
            )
            if alone.micro_batches(batch):
                estimate = self.estimator.estimate(alone)
                self.floors[key] = estimate.forward_seconds[0] + estimate.backward_seconds[0]
            else:  # the batch is too small for these experts: no bound
                self.floors[key] = 0.0
        whole, count = self.floors[key], layout.micro_batches(batch)
        if layout.pp == 1:
            return count * whole
        if layout.vpp > 1 or TABLE[layout.schedule].splits:
            return max(whole, count / layout.pp * whole)
        return max(whole, whole / (1 - (1 - 1 / count) ** layout.pp))

    def end(self) -> SearchResult:
        result = self.result
        result.fitting = best_of_each(estimate for estimates in self.fitting.values() for estimate in estimates)
        result.near_misses = [miss for degrees, miss in self.near_misses.items() if degrees not in self.fitting]
        return result


def _misfit_key(layout: Layout) -> tuple[object, ...]:
    """If one layout of a key is too large, so are those of the key with a larger micro-batch or a smaller shard degree,
    and those without its sequence parallelism (the last entry). Sharded and whole weights have different keys: whole
    weights need no buffers for gathering."""
    return (
        layout.dp,
        layout.tp,
        layout.pp,
        layout.cp,
        layout.ep,
        layout.vpp,
        layout.schedule,
        layout.recompute,
        layout.offload,
        layout.shard > 1,
        layout.sequence_parallel,
    )


def all_estimates(space: Space, estimator: Estimator) -> Iterator[Estimate]:
    """An estimate of every layout of a space, without shortcuts: the slow twin of `explore`."""
    return (estimator.estimate(layout) for layout in layouts(space))
