"""The walk through a Space: what fits, what is too large, and what a bound shows to be beaten without an estimate.

Four things spare estimates, none of which can cost the best layout (`every` is the slow twin without them; a test
holds the two together). More recompute only costs time, so it is taken only as far as it is needed. What does not fit
at its leanest does not fit with a larger micro-batch or a smaller shard either, and memory is counted before time. No
step is shorter than its micro-batches take on their way through the stages, so what is slower than the best by that
alone is left out; and what by its busiest rank is slower than another of its degrees is not replayed.
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

#: A simpler layout is taken over one predicted to be faster by less than this share. On 68 groups of measured layouts
#: the layout so picked is as quick as the one predicted quickest, up to 5 % (docs/predict.md).
TIE = 0.03
#: Spaces of more layouts than this, before the rules, are searched within tighter bounds.
MOST_LAYOUTS = {"whole": 15_000, "usual": 60_000}
#: A layout whose step must take this many times the best one found so far is not estimated: it would be no runner-up.
BEATEN = 1.25
#: How many sets of degrees are searched again, more finely, after a search within bounds.
REFINED = 4
REFINEMENT = replace(USUAL, name="refinement", sequence_off=True)

Value = Callable[[Estimate], float]


def step_seconds(estimate: Estimate) -> float:
    """The value that is made small where time counts."""
    return estimate.step_seconds


@dataclass(frozen=True)
class OversizedLayout:
    """A layout that does not fit: its peak and what its step would take at least."""

    peak_bytes: int
    least_seconds: float
    layout: Layout


@dataclass
class SearchResult:
    """What a search met.

    `counts`: of the layouts in its "space" so many were "estimated" (of these "missed" did not fit), "pruned" by a
    bound, "costlier" than one that fits, or "too_large" as a leaner one was. `fitting` has the best of each set of degrees
    that fits, `missing` the leanest of those sets of which nothing fits, `too_large` all counted that do not fit.
    """

    fitting: list[Estimate] = field(default_factory=list)
    missing: list[OversizedLayout] = field(default_factory=list)
    too_large: list[OversizedLayout] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    bounds: Bounds = WHOLE

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number


def complexity(layout: Layout) -> int:
    """How much there is to go wrong: what a tie is decided by."""
    return (
        4 * (layout.pp > 1) + 3 * (layout.tp > 1) + 3 * (layout.cp > 1) + 2 * (layout.ep > 1) + (layout.shard > 1)
        + (layout.recompute != "none") + 2 * (layout.vpp > 1) + (layout.schedule != "1f1b") + 2 * layout.offload
    )  # fmt: skip


def order_key(estimate: Estimate) -> tuple[float, int, str]:
    return estimate.step_seconds, estimate.peak_bytes, _last_word(estimate.layout)


def _last_word(layout: Layout) -> str:
    return " ".join(map(str, layout.as_dict().values()))


def ranked(estimates: list[Estimate], value: Value | None = None, least: float = float("inf")) -> list[Estimate]:
    """Best first, by seconds or by `value`; among those within TIE of it (or of what is known to be `least`), the
    simplest, then the leanest, is first."""
    worth = value or step_seconds
    order = sorted(estimates, key=lambda e: (worth(e), e.peak_bytes))
    if not order:
        return order
    limit = min(least, worth(order[0])) * (1 + TIE)
    tied = [e for e in order if worth(e) <= limit]
    tied.sort(key=lambda e: (complexity(e.layout), worth(e), e.peak_bytes, _last_word(e.layout)))
    return tied + order[len(tied) :]


def best_of_each(estimates: Iterable[Estimate]) -> list[Estimate]:
    """The quickest of each set of degrees, and whatever is within TIE of the quickest of all, which may be simpler."""
    found, degree_sets = sorted(estimates, key=order_key), set()
    kept = []
    for estimate in found:
        degrees = degrees_of(estimate.layout)
        if degrees not in degree_sets or estimate.step_seconds <= found[0].step_seconds * (1 + TIE):
            degree_sets.add(degrees)
            kept.append(estimate)
    return kept


def bounded(space: Space) -> Space:
    """The space in the widest bounds that can be searched in a moment."""
    for bounds in (WHOLE, USUAL):
        within = replace(space, bounds=bounds)
        if size(within, MOST_LAYOUTS[bounds.name] + 1) <= MOST_LAYOUTS[bounds.name]:
            return within
    return replace(space, bounds=NARROW)


def search(space: Space, estimator: Estimator) -> SearchResult:
    """What works in a space: in bounds where it is large, then more finely around the best; in the whole where nothing in
    the bounds fits."""
    within = bounded(space)
    found = explore(within, estimator)
    if within.bounds is WHOLE:
        return found
    if not found.fitting:
        for bounds in (USUAL, replace(USUAL, name="wide", tensor_across_nodes=True, least_tokens=256)):
            further = explore(replace(space, bounds=bounds), estimator)
            if further.fitting:
                return _refined(space, estimator, further)
            found = further if further.missing else found
        return found
    return _refined(space, estimator, found)


def _refined(space: Space, estimator: Estimator, found: SearchResult) -> SearchResult:
    """The best sets of degrees again, with every shard degree, schedule and depth of the whole space."""
    best = {e.layout: e for e in found.fitting}
    tried: set[tuple[object, ...]] = set()
    seconds = min(e.step_seconds for e in found.fitting)
    for estimate in ranked(found.fitting):
        degrees = {name: getattr(estimate.layout, name) for name in DEGREES if name != "shard"}
        if tuple(degrees.values()) in tried:
            continue
        tried.add(tuple(degrees.values()))
        finer = replace(space, pins={**degrees, **space.pins}, bounds=REFINEMENT)
        near = explore(finer, estimator, beaten=1 + 2 * TIE, known_seconds=seconds)
        seconds = min([seconds, *(e.step_seconds for e in near.fitting)])
        best.update({e.layout: e for e in near.fitting})
        for name, number in near.counts.items():
            found.count(name, number)
        if len(tried) == REFINED:
            break
    found.fitting = best_of_each(best.values())
    return found


def explore(
    space: Space, estimator: Estimator, *, beaten: float = BEATEN, known_seconds: float = float("inf")
) -> SearchResult:
    """For each set of degrees the fastest layout that fits (`best_of_each`), or the one that misses by least. What takes
    `beaten` times the best, or a step that is known to be possible, may be missing."""
    walk = _Walk(space, estimator, beaten, known_seconds)
    order = []
    for place, base in enumerate(base_layouts(space)):
        sizes = micro_batch_sizes(space, base)
        floor = min(walk.floor(replace(base, micro_batch=micro)) for micro in sizes)
        order.append((floor, place, base, sizes))
    for _, _, base, sizes in sorted(order, key=lambda entry: entry[:2]):  # what may be best first: it prunes the rest
        walk.follow(base, sizes)
    return walk.end()


class _Walk:
    """A search through the base layouts of a space, with what it has learnt on the way."""

    def __init__(self, space: Space, estimator: Estimator, beaten: float, known_seconds: float) -> None:
        self.space, self.estimator, self.beaten = space, estimator, beaten
        self.room = usable_bytes(space.workload.cluster.device)
        self.found = SearchResult(bounds=space.bounds)
        self.best_seconds = known_seconds
        self.fitting: dict[tuple[int, ...], list[Estimate]] = {}
        self.quickest: dict[tuple[int, ...], float] = {}  # seconds of the best of each set of degrees so far
        self.missing: dict[tuple[int, ...], OversizedLayout] = {}
        self.floors: dict[tuple[object, ...], float] = {}
        self.cannot: dict[tuple[object, ...], list[tuple[int, int]]] = {}  # (micro-batch, shard) that do not fit
        self.recomputes, self.offloads = space.recomputes(), space.offloads()
        self.variants = len(self.recomputes) * len(self.offloads)

    def follow(self, base: Layout, sizes: list[int]) -> None:
        """Every micro-batch of a base layout, ascending, and of each the least recompute and offload that fits."""
        degrees = degrees_of(base)
        for micro in sizes:
            self.found.count("space", self.variants)
            self._try_recomputes(replace(base, micro_batch=micro), degrees)

    def _try_recomputes(self, base: Layout, degrees: tuple[int, ...]) -> None:
        """A micro-batch without recompute, then with more and more of it; then with offload."""
        tried = pruned = known = 0
        for offload in self.offloads:
            for place, recompute in enumerate(self.recomputes):
                layout = replace(base, recompute=recompute, offload=offload)
                floor = self.floor(layout)
                if floor > self.beaten * self.best_seconds:
                    pruned += len(self.recomputes) - place
                    break
                if self._cannot_fit(layout):
                    known += 1
                    continue
                peak_bytes = self.estimator.peak_bytes(layout)
                if peak_bytes <= self.room:
                    if self._slow(layout, degrees):
                        pruned += 1
                    else:
                        tried += 1
                        self._keep(self.estimator.estimate(layout), degrees)
                    break
                tried += 1
                self._note(OversizedLayout(peak_bytes, floor, layout), degrees)
            else:
                continue  # nothing fits without offload, or nothing at all
            if place == 0:  # without recompute, or not worth it even so: offload only costs time
                break
        counts = {"estimated": tried, "pruned": pruned, "too_large": known}
        for name, number in (*counts.items(), ("costlier", self.variants - sum(counts.values()))):
            self.found.count(name, number)

    def _cannot_fit(self, layout: Layout) -> bool:
        """Whether a comparable layout with as small a micro-batch and as large a shard, or smaller and larger, cannot fit."""
        if layout.pp == 1 and not self._accumulates(layout):
            return False
        key = _comparable(layout)
        return any(
            micro <= layout.micro_batch and shard >= layout.shard
            for one in {key, (*key[:-1], True)}  # sequence parallelism leaves no more
            for micro, shard in self.cannot.get(one, ())
        )

    def _accumulates(self, layout: Layout) -> bool:
        return layout.micro_batches(self.space.workload.global_batch) > 1

    def _slow(self, layout: Layout, degrees: tuple[int, ...]) -> bool:
        """Whether another layout of the same degrees is quicker than this can be, and by more than a tie."""
        known = self.quickest.get(degrees)
        return known is not None and self.estimator.least_seconds(layout) > known * (1 + TIE)

    def _keep(self, estimate: Estimate, degrees: tuple[int, ...]) -> None:
        self.fitting.setdefault(degrees, []).append(estimate)
        seconds = estimate.step_seconds
        self.quickest[degrees] = min(seconds, self.quickest.get(degrees, seconds))
        self.best_seconds = min(self.best_seconds, seconds)

    def _note(self, one: OversizedLayout, degrees: tuple[int, ...]) -> None:
        self.found.count("missed")
        layout = one.layout
        # Where gradients are added up all grows with the micro-batch; in a pipeline they may take less with fewer of
        # them, so that there the rest must be too large already.
        if self._accumulates(layout) if layout.pp == 1 else self.estimator.least_bytes(layout) > self.room:
            self.cannot.setdefault(_comparable(layout), []).append((layout.micro_batch, layout.shard))
        self.found.too_large.append(one)
        known = self.missing.get(degrees)
        if known is None or one.peak_bytes < known.peak_bytes:
            self.missing[degrees] = one

    def floor(self, layout: Layout) -> float:
        """Seconds that a step takes at least. One micro-batch takes `whole` through all blocks, were nothing sharded
        over data parallelism. Some rank has its share of that m times. Of whole stages, a rank that begins has had to
        wait for those before it, at the end for their backwards: with stage times c, M = max over s of (sum of c before
        s) + m c_s, so c_s <= (M - sum) / m, and the sum of all is at most M (1 - (1 - 1 / m) ** pp). Where backwards
        are split, or a stage is cut into virtual ones that may be light at first, nobody need wait so long."""
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
            if not alone.micro_batches(
                self.space.workload.global_batch
            ):  # too few samples for these experts: none is known
                self.floors[key] = 0.0
            else:
                estimate = self.estimator.estimate(alone)
                self.floors[key] = estimate.forward_seconds[0] + estimate.backward_seconds[0]
        whole, count = self.floors[key], layout.micro_batches(self.space.workload.global_batch)
        if layout.pp == 1:
            return count * whole
        if layout.vpp > 1 or TABLE[layout.schedule].splits:
            return max(whole, count / layout.pp * whole)
        return max(whole, whole / (1 - (1 - 1 / count) ** layout.pp))

    def end(self) -> SearchResult:
        found = self.found
        found.fitting = best_of_each(estimate for several in self.fitting.values() for estimate in several)
        found.missing = [one for degrees, one in self.missing.items() if degrees not in self.fitting]
        return found


def _comparable(layout: Layout) -> tuple[object, ...]:
    """What layouts share of which one that is too large shows that a larger micro-batch, a smaller shard degree or the
    lack of sequence parallelism (that last, at the end) is too large as well. Whole weights compare with nothing that is
    sharded: they need no buffers to be gathered in."""
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


def every(space: Space, estimator: Estimator) -> Iterator[Estimate]:
    """An estimate of every layout of a space, whatever the bounds know: the slow twin of `explore`."""
    return (estimator.estimate(layout) for layout in layouts(space))
