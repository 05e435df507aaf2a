"""A profile corrected by a run: its steps and the spans of its trace change the constants behind its plan.

A run of one layout cannot determine every constant. Constants form groups (computing, the host, the network, the
optimizer), each scaled by one factor. The factors are the maximum a posteriori: they explain the measured parts of a
step while staying near one, each according to the trust in its group (normal errors of logarithms). A trace with
forward, backward and optimizer separates the groups; with steps alone, all groups share the error.
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
from meshwright.plan.calibrate.plausible import comparison, implausible, unit_hint
from meshwright.plan.constants import Profile
from meshwright.plan.constants.profile import within
from meshwright.plan.constants.regime import interval_regime
from meshwright.plan.cost import Estimator
from meshwright.plan.cost.cpu import CpuCompute
from meshwright.plan.rules import refusals
from meshwright.plan.workload import Workload
from meshwright.run import RunFolder

FEWEST_STEPS = 20
#: First steps, which do not count: buffers grow, kernels are chosen and compiled.
WARM_STEPS = 5
#: Relative error of a part of a step on a quiet machine: the model's own.
MODEL_ERROR = 0.03
LARGEST_FACTOR = 3.0
#: Share of AdamW and clipping in the host's work per step on a CPU (tiny models: 1.1 of 4 ms).
OPTIMIZER_HOST = 0.27
LARGEST_TRACE_BYTES = 1 << 28


@dataclass(frozen=True)
class ConstantGroup:
    """Constants that a run changes together, by prefixes of names: larger constants in `more` make a step longer, those
    in `less` shorter. `trust` is the standard deviation of the logarithm of the group's factor."""

    name: str
    trust: float
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    def scaled(self, constants: Mapping[str, float], factor: float) -> dict[str, float]:
        """The group's constants for times `factor` times as long, each within its bounds."""
        scaled = {name: value * factor for name, value in constants.items() if name.startswith(self.more)}
        scaled |= {name: value / factor for name, value in constants.items() if name.startswith(self.less)}
        return {name: within(name, value) for name, value in scaled.items()}


GROUPS: Mapping[str, tuple[ConstantGroup, ...]] = {
    "cpu": (
        ConstantGroup(
            "computing",
            0.25,
            more=("cpu.attention.fp32.score", "cpu.attention.bf16.score", "cpu.loss."),
            less=(
                "cpu.product.fp32.",
                "cpu.product.bf16.",
                "cpu.elementwise.",
                "cpu.copy.",
                "cpu.attention.fp32.share",
                "cpu.attention.bf16.share",
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
    """A part of the step: its median in the run, its relative noise, and its predictions before and after."""

    name: str
    measured: float
    noise: float
    before: float
    after: float


@dataclass(frozen=True)
class RunFit:
    """The corrected profile, and how it was made. `interval` is for layouts near the run's."""

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
    """What was trained, on what, and how; `predicted` are the plan's seconds of a step."""

    workload: Workload
    layout: Layout
    compiled: bool = False
    predicted: float | None = None


def run_profile(run: RunFolder, trained: TrainedRun, start: Profile, name: str) -> RunFit:
    """`start` corrected by the run in folder `run`.

    Raises InputError for a run of fewer than FEWEST_STEPS steps, for a plan that cannot have run on this cluster, and
    for times that are invalid or implausible.
    """
    _check_plan(run.plan, trained)
    observed = _observed(run, trained.workload.cluster.device.kind)
    for part, predicted in _predicted_parts(trained, start).items():
        measured = statistics.median(observed.get(part, [predicted]))
        if implausible(measured, predicted):
            file, hint = run.events, unit_hint(measured, predicted)
            if part != "step":
                file, hint = run.trace, "dur is in microseconds; without the file, steps alone count"
            raise InputError(Problem(str(file), f"the median {part} took {comparison(measured, predicted)}", hint))
    note = f"corrected by {len(observed['step'])} steps of the run {run.path.name}, {trained.layout}"
    return correct_profile(trained, observed, start, name, note)


def correct_profile(
    trained: TrainedRun,
    observed: Mapping[str, Sequence[float]],
    start: Profile,
    name: str,
    note: str = "corrected by a run",
) -> RunFit:
    """`start` corrected by the seconds of each step ("step") and of its measured parts ("forward", "backward",
    "optimizer": sums over the step, mean over the ranks). `note` is added to `assumed`."""
    kind = trained.workload.cluster.device.kind
    before = _predicted_parts(trained, start)
    names = [part for part in before if part in observed]
    medians = {part: statistics.median(observed[part]) for part in names}
    noise = {part: _noise(observed[part]) for part in names}
    factors = _factors(GROUPS[kind], start, medians, noise, lambda profile: _predicted_parts(trained, profile))
    values: dict[str, float] = {}
    for group in GROUPS[kind]:
        values |= group.scaled(start.constants, factors[group.name])
    profile = start.changed(values, name)
    after = _predicted_parts(trained, profile)
    words = interval_regime(trained.workload)
    error = abs(math.log(medians["step"] / after["step"])) + 1.65 * noise["step"]
    interval = _nearby_interval(start.interval(*words), error)
    assumed = [*start.assumed, note]
    if trained.compiled:
        assumed.append("that run was compiled: what this saves is assumed, not measured")
    profile = replace(profile, intervals={**start.intervals, ".".join(words): interval}, assumed=tuple(assumed))
    parts = tuple(StepPart(part, medians[part], noise[part], before[part], after[part]) for part in names)
    return RunFit(profile, len(observed["step"]), factors, parts, tuple(changes(start, profile)), interval)


def _check_plan(plan: Path, trained: TrainedRun) -> None:
    """Raises InputError, naming the file, for a plan that cannot have been trained on `trained`'s cluster."""
    workload, device = trained.workload, trained.workload.cluster.device
    kinds = {name: type(field.default) for name, field in Layout.__dataclass_fields__.items()}
    wrong = [name for name, kind in kinds.items() if type(getattr(trained.layout, name)) is not kind]
    problems = [f"chosen.layout.{name} is {getattr(trained.layout, name)!r:.40}" for name in wrong]
    if not wrong:
        problems += [f"chosen.layout: {refusal.reason}" for refusal in refusals(workload.query(trained.layout))]
    if workload.precision not in list(device.flops):
        problems.append(f"chosen.precision is {workload.precision!r:.40}; {device.name} has none")
    if trained.predicted is not None and not _is_time(trained.predicted):
        problems.append(f"chosen.predicted.step_seconds.mid is {trained.predicted!r:.40}")
    if problems:
        hint = "calibrate by a run as `train` left it, on the machine that trained"
        raise InputError([Problem(str(plan), problem, hint) for problem in problems])


def _observed(run: RunFolder, kind: str) -> dict[str, list[float]]:
    """Seconds of the steps that count, and of their parts if there is a trace; "step" comes first."""
    steps = run.steps()
    if len(steps) < FEWEST_STEPS:
        what = f"{len(steps)} steps are too few to correct a plan by"
        raise InputError(Problem(str(run.path), what, f"train at least {FEWEST_STEPS}: train.steps={FEWEST_STEPS}"))
    for step in steps:
        if not _is_time(seconds := step.get("step_seconds")) or seconds == 0:
            where = f"{run.events}:{_line_number(run.events, step['step'])}"
            raise InputError(Problem(where, f"step_seconds is {seconds!r:.40}", "a step takes seconds above zero"))
    counted = {step["step"]: float(step["step_seconds"]) for step in steps[WARM_STEPS:]}
    observed = {"step": list(counted.values())}
    if kind == "cpu":  # on a GPU spans are the host's time: work is queued, not done
        observed |= spans(run.trace, counted)
    return observed


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= sys.float_info.max


def _line_number(events: Path, step: int) -> int:
    """The number of the last line about `step` in an event log, from one."""
    last = 0
    for number, line in enumerate(events.read_bytes().split(b"\n"), 1):
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the log's reader skips it too
        if isinstance(event, dict) and event.get("event") == "step" and event.get("step") == step:
            last = number
    return last


def _nearby_interval(before: tuple[float, float], error: float) -> tuple[float, float]:
    """The 90 % interval of layouts near a measured one: as wide as the remaining `error` of a logarithm, and at least
    half as wide as before, since other layouts have errors of their own."""
    low, high = (max(error, 0.5 * abs(math.log(end))) for end in before)
    return math.exp(-low), math.exp(high)


def spans(trace: Path, steps: Mapping[int, float]) -> dict[str, list[float]]:
    """Seconds by part of each of the `steps` that is complete in the trace: the sum of a rank's spans of that name,
    then the mean over the ranks, so that the parts add up to the step (a rank early in one part waits in another). {}
    without a trace.

    Raises InputError for a file that is no trace, and for a span with an invalid time.
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
    complete = {step for name, step, _ in sums if name == "batch"}
    by_part: dict[str, dict[int, list[float]]] = {}
    for (name, step, _), seconds in sums.items():
        if step in complete and step in steps:
            by_part.setdefault(name, {}).setdefault(step, []).append(seconds)
    return {
        name: [statistics.fmean(ranks) for ranks in by_step.values()]
        for name, by_step in by_part.items()
        if len(by_step) >= 3
    }


def _predicted_parts(trained: TrainedRun, profile: Profile) -> dict[str, float]:
    """The profile's seconds of the step, and of those of its parts that a trace has."""
    card, layout = trained.workload.card, trained.layout
    estimator = Estimator(trained.workload, profile)
    estimator = estimator.compiled if trained.compiled else estimator
    estimate = estimator.estimate(layout, exact=True)
    parts = {"step": estimate.step_seconds}
    compute = estimator.blocks.compute
    if isinstance(compute, CpuCompute):
        elements = sum(block.parameter_elements for block in card.blocks) / (layout.tp * layout.pp * layout.shard)
        parts["optimizer"] = compute.optimizer(elements) + OPTIMIZER_HOST * compute.step_seconds
    if layout.pp == 1:
        m = estimate.micro_batches
        forward, backward = m * estimate.forward_seconds[0], m * estimate.backward_seconds[0]
        parts |= {"forward": forward, "backward": backward + estimate.per_step.gradients}
    return parts


def _noise(values: Sequence[float]) -> float:
    """Relative standard deviation, estimated from the median distance from the median."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle if middle > 0 else 0.0


def _factors(
    groups: Sequence[ConstantGroup],
    start: Profile,
    medians: Mapping[str, float],
    noise: Mapping[str, float],
    predicted: Callable[[Profile], Mapping[str, float]],
) -> dict[str, float]:
    """Factors by group, by Gauss-Newton steps on logarithms."""

    def logs(at: np.ndarray) -> np.ndarray:
        values: dict[str, float] = {}
        for group, log in zip(groups, at, strict=True):
            values |= group.scaled(start.constants, math.exp(log))
        parts = predicted(start.changed(values))
        return np.array([math.log(parts[name]) for name in medians])

    target = np.array([math.log(seconds) for seconds in medians.values()])
    error = np.array([math.hypot(MODEL_ERROR, noise[name]) for name in medians])
    trust = np.array([group.trust for group in groups])
    at, step = np.zeros(len(groups)), 1e-3
    for _ in range(6):
        now = logs(at)
        slope = np.stack([(logs(at + step * unit) - now) / step for unit in np.eye(len(groups))], axis=1)
        rows = np.concatenate([slope / error[:, None], np.diag(1 / trust)])
        aims = np.concatenate([(target - now) / error, -at / trust])
        move = np.linalg.lstsq(rows, aims, rcond=None)[0]
        at = np.clip(at + move, -math.log(LARGEST_FACTOR), math.log(LARGEST_FACTOR))
        if float(np.abs(move).max()) < 1e-4:
            break
    return {group.name: float(math.exp(log)) for group, log in zip(groups, at, strict=True)}
