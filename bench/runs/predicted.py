"""The planner's predictions of runs that `bench.runs` measured, and the table of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from bench.runs.models import MODELS
from bench.runs.worker import job_of
from meshwright.card import Card
from meshwright.cluster import cpu_cluster
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.constants import Profile
from meshwright.plan.cost import Estimate, Estimator
from meshwright.verbs import card_of_job

#: {layout, precision, stages, rounds: [[seconds]], cpu_seconds (rank 0), spans (by rank)}.
MeasuredRun = dict[str, Any]


def card_of(model: str) -> Card:
    """The card that the planner sees."""
    return card_of_job(job_of(model))


class FixedStages(Estimator):
    """An estimator with given pipeline stages."""

    first_blocks: tuple[int, ...] = (0,)

    def stages(self, layout: Layout) -> tuple[int, ...]:
        return self.first_blocks


def estimate(card: Card, run: MeasuredRun, batch: int, profile: Profile) -> Estimate:
    """The prediction of a measured run."""
    layout = Layout(**run["layout"])
    estimator = FixedStages(Workload(card, cpu_cluster(layout.devices), batch, run["precision"]), profile)
    names = [block.name for block in card.blocks]
    estimator.first_blocks = tuple(names.index(stage[0]) for stage in run["stages"])
    return estimator.estimate(layout, exact=True)


def median_seconds(run: MeasuredRun) -> float:
    """The run's step: the median of its rounds' medians."""
    return statistics.median(statistics.median(seconds) for seconds in run["rounds"])


def noise(run: MeasuredRun) -> float:
    """Mean relative distance of the rounds from their median."""
    middle = median_seconds(run)
    return statistics.fmean(abs(statistics.median(seconds) / middle - 1) for seconds in run["rounds"])


def table(
    measured: Mapping[str, list[MeasuredRun]], profiles: Mapping[str, Profile], title: str
) -> tuple[str, list[float]]:
    """Predicted beside measured seconds by the profile of each model, a row per run, then a row per model; and the
    logarithm of measured over predicted of every run."""
    lines = ["", title, "", "| model | layout | measured, s | predicted, s | error | noise |"]
    lines.append("|---|---|---|---|---|---|")
    summary, logs = [], []
    for model, runs in measured.items():
        card, profile = card_of(model), profiles[model]
        guesses = [estimate(card, run, MODELS[model][2], profile).step_seconds for run in runs]
        seconds = [median_seconds(run) for run in runs]
        errors = [guess / second - 1 for guess, second in zip(guesses, seconds, strict=True)]
        logs += [math.log(second / guess) for guess, second in zip(guesses, seconds, strict=True)]
        for run, guess, second, error in zip(runs, guesses, seconds, errors, strict=True):
            name = f"{Layout(**run['layout'])} {run['precision']}"
            lines.append(f"| {model} | {name} | {second:.3f} | {guess:.3f} | {error:+.0%} | {noise(run):.0%} |")
        low, high = profile.interval("cpu", "meshwright", "node")
        inside = sum(low * guess <= second <= high * guess for guess, second in zip(guesses, seconds, strict=True))
        regrets = []
        for precision in sorted({run["precision"] for run in runs}):
            group = [index for index, run in enumerate(runs) if run["precision"] == precision]
            chosen = min(group, key=lambda index: guesses[index])
            best = min(group, key=lambda index: seconds[index])
            regrets.append(f"{precision} {seconds[chosen] / seconds[best] - 1:.0%}")
        summary.append(
            f"| {model} | {len(runs)} | {statistics.fmean(map(abs, errors)):.1%} | {statistics.fmean(errors):+.1%} "
            f"| {max(map(abs, errors)):.0%} | {statistics.fmean(map(noise, runs)):.1%} | {inside / len(runs):.0%} "
            f"| {', '.join(regrets)} |"
        )
    head = "| model | runs | mean error | bias | largest | noise | in the interval | regret of the choice |"
    lines += ["", head, "|---|---|---|---|---|---|---|---|", *summary, ""]
    lines.append(f"Mean error of all {len(logs)} runs: {statistics.fmean(abs(math.exp(-log) - 1) for log in logs):.1%}")
    return "\n".join(lines), logs
