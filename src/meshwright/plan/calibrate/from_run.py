"""A profile correct_profile by a run: what its steps and the spans of its trace say about the constants behind its plan.

A run of one layout cannot tell every constant. Constants go in groups (computing, the host, the network, the
optimizer), each scaled by one factor; the factors are those that explain the measured parts of a step best while
staying near one, each as near as we trust its group (maximum a posteriori, with normal errors of logarithms). Where the
trace parts forward, backward and optimizer, the groups part too; where there is only the step, all share the blame.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.layout import Layout
from meshwright.plan.calibrate.from_machine import Change, changes
from meshwright.plan.calibrate.plausible import compared, implausible, in_seconds
from meshwright.plan.constants import Profile
from meshwright.plan.constants.profile import within
from meshwright.plan.constants.regime import interval_regime
from meshwright.plan.cost import Estimator
from meshwright.plan.cost.cpu import CpuCompute
from meshwright.plan.rules import refusals
from meshwright.plan.workload import Workload
from meshwright.run import RunFolder

FEWEST_STEPS = 20
#: First steps that do not count: buffers grow, kernels are chosen and compiled.
WARM_STEPS = 5
#: Relative error that a part of a step keeps however quiet the machine: what the model itself gets wrong there.
MODEL_ERROR = 0.03
LARGEST_FACTOR = 3.0
#: Share of a CPU step's own host work that AdamW and clipping start (tiny models: 1.1 of 4 ms).
OPTIMIZER_HOST = 0.27
LARGEST_TRACE_BYTES = 1 << 28


@dataclass(frozen=True)
class ConstantGroup:
    """Constants that a run moves together: names by prefix, +1 where a larger constant means more time, -1 where
    less. `trust` is the standard deviation of the logarithm of its factor that we believe in."""

    name: str
    trust: float
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    def scaled(self, constants: Mapping[str, float], factor: float) -> dict[str, float]:
        """The group's constants when its time is `factor` times as long, each as far as a profile may have it."""
        found = {name: value * factor for name, value in constants.items() if name.startswith(self.more)}
        found |= {name: value / factor for name, value in constants.items() if name.startswith(self.less)}
        return {name: within(name, value) for name, value in found.items()}


GROUPS: Mapping[str, tuple[ConstantGroup, ...]] = {
    "cpu": (
        ConstantGroup(
            "computing",
            0.25,
            more=(
                *(f"cpu.attention.{word}.score" for word in ("fp32", "bf16")),
                "cpu.loss.",
            ),
            less=(
                "cpu.product.fp32.",
                "cpu.product.bf16.",
                "cpu.elementwise.",
                "cpu.copy.",
                *(f"cpu.attention.{word}.share" for word in ("fp32", "bf16")),
            ),
        ),
        ConstantGroup("host", 0.4, more=("cpu.host.",)),
        ConstantGroup(
            "network",
            0.5,
            more=tuple(f"cpu.net.{name}.latency" for name in ("all_reduce", "all_gather", "reduce_scatter")),
            less=tuple(f"cpu.net.{name}.share" for name in ("all_reduce", "all_gather", "reduce_scatter")),
        ),
        ConstantGroup("optimizer", 0.3, less=("cpu.optimizer.",)),
    ),
    "cuda": (
        ConstantGroup("computing", 0.25, less=("cuda.product.share", "cuda.attention.share", "cuda.memory.share")),
        ConstantGroup("host", 0.4, more=("cuda.host.share", "cuda.host.collective_seconds", "cuda.step_seconds")),
        ConstantGroup("network", 0.4, less=("cuda.net.ring_share", "cuda.net.inter_share", "cuda.net.switch_share")),
        ConstantGroup("optimizer", 0.3, more=("cuda.optimizer.bytes",)),
    ),
}


@dataclass(frozen=True)
class StepPart:
    """A part of the step: its median in the run, its noise (relative), and what was and is now predicted."""

    name: str
    measured: float
    noise: float
    before: float
    after: float


@dataclass(frozen=True)
class RunFit:
    """The correct_profile profile, and what it rests on. `interval` is of layouts near the run's."""

    profile: Profile
    steps: int
    factors: Mapping[str, float]
    parts: tuple[StepPart, ...]
    changes: tuple[Change, ...]
    interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "noise": self.parts[0].noise,
            "factors": dict(self.factors),
            "parts": [vars(part) for part in self.parts],
            "changed": [change.as_dict() for change in self.changes],
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class TrainedRun:
    """What was trained, on what, and how; `predicted` are the seconds of a step that its plan said."""

    workload: Workload
    layout: Layout
    compiled: bool = False
    predicted: float | None = None


def run_profile(run: RunFolder, trained: TrainedRun, start: Profile, name: str) -> RunFit:
    """`start`, correct_profile by the run in folder `run`.

    Raises InputError for a run of fewer than FEWEST_STEPS steps, saying how many there are, for a plan that cannot have
    run on this cluster, and for times that are none or cannot be of it.
    """
    _check_plan(run.plan, trained)
    observed = _observed(run, trained.workload.cluster.device.kind)
    for part, predicted in _parts(trained, start).items():
        measured = statistics.median(observed.get(part, [predicted]))
        if implausible(measured, predicted):
            file, hint = run.events, in_seconds(measured, predicted)
            if part != "step":
                file, hint = run.trace, "dur is in microseconds; without the file, steps alone count"
            raise InputError(Problem(str(file), f"the median {part} took {compared(measured, predicted)}", hint))
    said = f"corrected by {len(observed['step'])} steps of the run {run.path.name}, {trained.layout}"
    return correct_profile(trained, observed, start, name, said)


def correct_profile(
    trained: TrainedRun,
    observed: Mapping[str, Sequence[float]],
    start: Profile,
    name: str,
    said: str = "corrected by a run",
) -> RunFit:
    """`start`, correct_profile by the seconds of each step ("step") and of those of its parts that are known ("forward",
    "backward", "optimizer"; sums over the step, the mean of the ranks)."""
    kind = trained.workload.cluster.device.kind
    before = _parts(trained, start)
    names = [part for part in before if part in observed]
    middle = {part: statistics.median(observed[part]) for part in names}
    noise = {part: _noise(observed[part]) for part in names}
    factors = _factors(GROUPS[kind], start, names, middle, noise, lambda profile: _parts(trained, profile))
    values: dict[str, float] = {}
    for group in GROUPS[kind]:
        values |= group.scaled(start.constants, factors[group.name])
    moved = start.changed(values, name)
    after = _parts(trained, moved)
    words = interval_regime(trained.workload)
    regime = ".".join(words)
    left = abs(math.log(middle["step"] / after["step"])) + 1.65 * noise["step"]
    interval = _near(start.interval(*words), left)
    assumed = [*start.assumed, said]
    if trained.compiled:
        assumed.append("that run was compiled: what this saves is supposed, not measured")
    intervals = {**start.intervals, regime: interval}
    profile = replace(moved, intervals=intervals, assumed=tuple(assumed))
    parts = tuple(StepPart(part, middle[part], noise[part], before[part], after[part]) for part in names)
    return RunFit(profile, len(observed["step"]), factors, parts, tuple(changes(start, profile)), interval)


def _check_plan(plan: Path, trained: TrainedRun) -> None:
    """Raises InputError, naming the file, for a plan that cannot have been trained on the cluster of `trained`."""
    kinds = {name: type(field.default) for name, field in Layout.__dataclass_fields__.items()}
    wrong = [name for name, kind in kinds.items() if type(getattr(trained.layout, name)) is not kind]
    problems = [f"chosen.layout.{name} is {getattr(trained.layout, name)!r:.40}" for name in wrong]
    if not wrong:
        problems += [f"chosen.layout: {one.reason}" for one in refusals(trained.workload.query(trained.layout))]
    if trained.workload.precision not in list(trained.workload.cluster.device.flops):
        problems.append(
            f"chosen.precision is {trained.workload.precision!r:.40}; {trained.workload.cluster.device.name} has none"
        )
    if trained.predicted is not None and not _is_time(trained.predicted):
        problems.append(f"chosen.predicted.step_seconds.mid is {trained.predicted!r:.40}")
    if problems:
        hint = "calibrate by a run as `train` left it, on the machine that trained"
        raise InputError([Problem(str(plan), problem, hint) for problem in problems])


def _observed(run: RunFolder, kind: str) -> dict[str, list[float]]:
    """Seconds of the steps that count, and of their parts where a trace tells them; "step" comes first."""
    steps = run.steps()
    if len(steps) < FEWEST_STEPS:
        what = f"{len(steps)} steps are too few to correct a plan by"
        raise InputError(Problem(str(run.path), what, f"train at least {FEWEST_STEPS}: train.steps={FEWEST_STEPS}"))
    for step in steps:
        if not _is_time(seconds := step.get("step_seconds")) or seconds == 0:
            where = f"{run.events}:{_line(run.events, step['step'])}"
            raise InputError(Problem(where, f"step_seconds is {seconds!r:.40}", "a step takes seconds above zero"))
    settled = {step["step"]: float(step["step_seconds"]) for step in steps[WARM_STEPS:]}
    observed = {"step": list(settled.values())}
    if kind == "cpu":  # on a GPU spans are the host's time: work is queued, not done
        observed |= spans(run.trace, settled)
    return observed


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= sys.float_info.max


def _line(events: Path, step: int) -> int:
    """The last line of an event log that tells of the step, counted from one."""
    found = 0
    for number, line in enumerate(events.read_bytes().split(b"\n"), 1):
        try:
            event = json.loads(line)
        except ValueError:
            continue  # left out by the log's reader too
        if isinstance(event, dict) and event.get("event") == "step" and event.get("step") == step:
            found = number
    return found


def _near(before: tuple[float, float], left: float) -> tuple[float, float]:
    """The 90 % interval of layouts near one that was measured: what `left` says (what the correction left over, and
    noise), but no less than half as wide as before, since other layouts have errors of their own."""
    low, high = (max(left, 0.5 * abs(math.log(end))) for end in before)
    return math.exp(-low), math.exp(high)


def spans(trace: Path, steps: Mapping[int, float]) -> dict[str, list[float]]:
    """Seconds by part for each of the `steps` that the trace holds whole: the sum of a rank's spans of that name, the
    mean of the ranks, so that the parts add up to the step: who is early in one waits in another. {} without a trace.

    Raises InputError for what is no trace, and for a span whose time is none.
    """
    if not trace.is_file() or trace.stat().st_size > LARGEST_TRACE_BYTES:
        return {}
    try:
        events = json.loads(trace.read_bytes())["traceEvents"]
        sums: dict[tuple[str, int, int], float] = {}
        for place, event in enumerate(events):
            if event.get("ph") == "X" and "step" in event.get("args", {}):
                key = (str(event["name"]), int(event["args"]["step"]), int(event["pid"]))
                if not _is_time(event["dur"]):
                    where, what = f"{trace}: traceEvents[{place}]", f"dur is {event['dur']!r:.40}"
                    raise InputError(Problem(where, what, "a span takes microseconds, zero or more"))
                sums[key] = sums.get(key, 0.0) + float(event["dur"]) / 1e6
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(Problem(str(trace), f"is not a trace of a run ({error})")) from error
    whole = {step for name, step, _ in sums if name == "batch"}
    found: dict[str, dict[int, list[float]]] = {}
    for (name, step, _), seconds in sums.items():
        if step in whole and step in steps:
            found.setdefault(name, {}).setdefault(step, []).append(seconds)
    return {
        name: [statistics.fmean(ranks) for ranks in by_step.values()]
        for name, by_step in found.items()
        if len(by_step) >= 3
    }


def _parts(trained: TrainedRun, profile: Profile) -> dict[str, float]:
    """What the profile predicts of the parts that a trace tells."""
    card, layout = trained.workload.card, trained.layout
    estimator = Estimator(trained.workload, profile)
    estimator = estimator.compiled if trained.compiled else estimator
    found = estimator.estimate(layout, exact=True)
    parts = {"step": found.step_seconds}
    compute = estimator.blocks.compute
    if isinstance(compute, CpuCompute):
        elements = sum(block.parameter_elements for block in card.blocks) / (layout.tp * layout.pp * layout.shard)
        parts["optimizer"] = compute.optimizer(elements) + OPTIMIZER_HOST * compute.step_seconds
    if layout.pp == 1:
        m = found.micro_batches
        forward, backward = m * found.forward_seconds[0], m * found.backward_seconds[0]
        parts |= {"forward": forward, "backward": backward + found.per_step.gradients}
    return parts


def _noise(values: Sequence[float]) -> float:
    """Relative spread: the median distance from the median, as the standard deviation of a normal would be."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle if middle > 0 else 0.0


def _factors(
    groups: Sequence[ConstantGroup],
    start: Profile,
    names: Sequence[str],
    middle: Mapping[str, float],
    noise: Mapping[str, float],
    predicted: Callable[[Profile], Mapping[str, float]],
) -> dict[str, float]:
    """Factors by group, by Gauss-Newton on logarithms."""

    def logs(at: np.ndarray) -> np.ndarray:
        values: dict[str, float] = {}
        for group, log in zip(groups, at, strict=True):
            values |= group.scaled(start.constants, math.exp(log))
        found = predicted(start.changed(values))
        return np.array([math.log(found[name]) for name in names])

    target = np.array([math.log(middle[name]) for name in names])
    error = np.array([math.hypot(MODEL_ERROR, noise[name]) for name in names])
    trust = np.array([group.trust for group in groups])
    at, step = np.zeros(len(groups)), 1e-3
    for _ in range(6):
        now = logs(at)
        slope = np.stack([(logs(at + step * unit) - now) / step for unit in np.eye(len(groups))], axis=1)
        rows = np.concatenate([slope / error[:, None], np.diag(1 / trust)])
        left = np.concatenate([(target - now) / error, -at / trust])
        move = np.linalg.lstsq(rows, left, rcond=None)[0]
        at = np.clip(at + move, -math.log(LARGEST_FACTOR), math.log(LARGEST_FACTOR))
        if float(np.abs(move).max()) < 1e-4:
            break
    return {group.name: float(math.exp(log)) for group, log in zip(groups, at, strict=True)}
