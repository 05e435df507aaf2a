"""Predicted against measured step time on this machine, for layouts of several models of our own.

    python -m bench.runs                              measures all runs and prints the tables (about eight minutes)
    python -m bench.runs --save /tmp/runs.json        the same, and saves the raw seconds
    python -m bench.runs --load /tmp/runs.json        predicts again, measures nothing
    python -m bench.runs --profile other.toml         with a table of another profile too

There is a table for each of five sets of constants:
- those of microbenchmarks;
- the shipped profile, fitted to runs of these models on one machine (named in default.toml);
- the shipped profile, changed by `calibrate machine` just before (for --probe seconds; 0 leaves it out);
- the shipped profile, corrected by one run of each model;
- constants fitted to this machine's runs of the other models. The shipped ones are made in this way from the runs of
  all models (--write-default).
On the machine of the shipped profile only the first and the last set have not seen the run that they predict.

There is at most one rank per core. Two worlds take turns, one of two processes and one of a single process with both
cores, and every round goes through all layouts, so that other work on the machine affects all of them alike. The noise
is the mean relative distance of a layout's rounds from its median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.runs.fit import held_out, unfitted, write_default, write_intervals
from bench.runs.models import MODELS, Run, runs
from bench.runs.predicted import MeasuredRun, card_of, estimate, median_seconds, table
from meshwright import launch, probe
from meshwright.card import Card
from meshwright.cluster import cpu_cluster
from meshwright.layout import Layout
from meshwright.plan import Workload
from meshwright.plan.calibrate import TrainedRun, machine_profile
from meshwright.plan.calibrate.from_run import correct_profile
from meshwright.plan.constants import Profile, default_profile, load_profile
from meshwright.plan.cost import Estimator

WORLDS = (1, 2)


def stages_of(card: Card, run: Run, batch: int) -> tuple[tuple[str, ...], ...]:
    """Block names by stage, as balanced by the default profile."""
    estimator = Estimator(Workload(card, cpu_cluster(run.layout.devices), batch, run.precision))
    starts = estimator.stages(run.layout)
    names = [block.name for block in card.blocks]
    return tuple(tuple(names[start:stop]) for start, stop in zip(starts, (*starts[1:], len(names)), strict=True))


def measure(models: Sequence[str], rounds: int, warm: int, counted: int) -> dict[str, list[MeasuredRun]]:
    """The measured runs of each model."""
    of_model: dict[str, list[MeasuredRun]] = {}
    for model in models:
        card, batch = card_of(model), MODELS[model][2]
        of_model[model] = [
            {"layout": run.layout.as_dict(), "precision": run.precision, "stages": stages_of(card, run, batch)}
            for run in runs(model)
        ]
    turns = [
        {"world": world, "model": model, "round": number}
        for model in models
        for number in range(rounds + 1)
        for world in WORLDS
    ]
    with tempfile.TemporaryDirectory(prefix="meshwright-runs-") as folder:
        payload = {"turns": turns, "runs": of_model, "folder": folder, "warm": warm, "counted": counted}
        worlds = [launch.local("bench.runs.worker:work", payload, size, folder) for size in WORLDS]
        try:
            (Path(folder) / "turn-0").touch()
            while any(world.poll() == "running" for world in worlds):
                if any(world.poll() == "failed" for world in worlds):
                    break
                time.sleep(0.2)
            for world in sorted(worlds, key=lambda world: world.poll() != "failed"):  # raises the error of a failed one
                world.wait(5.0)
            answers = {size: world.wait(5.0) for size, world in zip(WORLDS, worlds, strict=True)}
        finally:
            for world in worlds:
                world.stop()
    for model in models:
        rows = {size: iter(zip(*(rank[model] for rank in answers[size]), strict=True)) for size in WORLDS}
        for one in of_model[model]:
            ranks = next(rows[Layout(**one["layout"]).devices])
            one.update(ranks[0], spans=[rank["spans"] for rank in ranks])
    return of_model


def after_a_run(measured: Mapping[str, list[MeasuredRun]], profile: Profile) -> str:
    """A row per model: the mean error of its runs before and after the profile is corrected by one of them, the
    replicated one. It counts the other runs in the same precision."""
    lines = ["", f"Corrected by one run (dp2), from the profile {profile.name}:", ""]
    lines += ["| model | runs | mean error before | after | factors |", "|---|---|---|---|---|"]
    for model, model_runs in measured.items():
        card, batch = card_of(model), MODELS[model][2]
        source = next(one for one in model_runs if _is_replicated(Layout(**one["layout"])))
        layout = Layout(**source["layout"])
        trained = TrainedRun(Workload(card, cpu_cluster(2), batch, source["precision"]), layout)
        observed = {"step": [seconds for turn in source["rounds"] for seconds in turn]}
        for name in ("forward", "backward", "optimizer"):
            observed[name] = [
                statistics.fmean(ranks[name] for ranks in step) for step in zip(*source["spans"], strict=True)
            ]
        fit = correct_profile(trained, observed, profile, "corrected")
        others = [one for one in model_runs if one is not source and one["precision"] == source["precision"]]
        before, after = (
            statistics.fmean(
                abs(estimate(card, one, batch, each).step_seconds / median_seconds(one) - 1) for one in others
            )
            for each in (profile, fit.profile)
        )
        factors = ", ".join(f"{name} {factor:.2f}" for name, factor in fit.factors.items())
        lines.append(f"| {model} | {len(others)} | {before:.1%} | {after:.1%} | {factors} |")
    return "\n".join(lines)


def _is_replicated(layout: Layout) -> bool:
    return layout.dp == 2 and layout.shard == 1 and layout.recompute == "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warm", type=int, default=1, help="warm-up steps of a round")
    parser.add_argument("--counted", type=int, default=2, help="counted steps of a round")
    parser.add_argument("--save", type=Path, help="save the raw seconds to this file")
    parser.add_argument("--load", type=Path, help="read the raw seconds from this file, measure nothing")
    parser.add_argument("--profile", type=Path, nargs="*", default=[], help="other profiles, beside the default")
    parser.add_argument("--probe", type=float, default=40.0, help="seconds to measure the machine for its own profile")
    parser.add_argument("--write-default", action="store_true", help="fit the CPU constants of the shipped profile")
    parser.add_argument("--write-intervals", action="store_true", help="widen the CPU intervals of the shipped profile")
    options = parser.parse_args()
    if options.load:
        loaded = json.loads(options.load.read_text())
        measured = {model: rows for model, rows in loaded["measured"].items() if model in options.models}
        machine = loaded.get("machine")
    else:
        print(f"load {os.getloadavg()[0]:.2f} before", file=sys.stderr)
        began = time.perf_counter()
        machine = probe.machine(options.probe) if options.probe else None
        print(f"probed in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        began = time.perf_counter()
        measured = measure(options.models, options.rounds, options.warm, options.counted)
        print(f"measured in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if options.save:
        options.save.write_text(json.dumps({"measured": measured, "machine": machine, "load": os.getloadavg()}))
    profiles = [replace(unfitted(), name="microbenchmarks"), default_profile()]
    if machine:
        profiles.append(machine_profile(machine, cpu_cluster(), default_profile(), "shipped, then calibrate machine"))
    for profile in (*profiles, *(load_profile(path) for path in options.profile)):
        print(table(measured, dict.fromkeys(measured, profile), f"Profile: {profile.name}")[0])
    print(after_a_run(measured, default_profile()))
    print(held_out(measured)[0])
    if options.write_default:
        write_default(measured)
    if options.write_intervals:
        write_intervals(measured)


if __name__ == "__main__":
    main()
