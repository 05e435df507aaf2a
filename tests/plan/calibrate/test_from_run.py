"""A run's steps and spans change the constants that they depend on."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.cluster import Cluster, Device, Link
from meshwright.errors import InputError
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import Plan, PlanRequest, Workload, make_plan
from meshwright.plan.calibrate import TrainedRun, run_profile
from meshwright.plan.calibrate.from_run import GROUPS, _predicted_parts
from meshwright.plan.constants import DATASHEET, Profile, load_profile
from meshwright.run import RunFolder

MODEL = card(LlamaShape(layers=4, hidden=256, heads=8, kv_heads=8, head_dim=32, ffn=704, vocab=2048), seq_len=128)
CORE = Device("core", "cpu", 10**10, {"fp32": 1e11, "bf16": 4e11}, 3e10, 6e-6, units=1)
LINK = Link("gloo", 1e9, 0.35e-3, topology="host")
CLUSTER = Cluster(CORE, 2, 2, LINK, LINK)
BATCH = 16


def planned(**pins: int) -> Plan:
    request = PlanRequest(BATCH, precision="fp32", pins=pins, compile=False)
    return make_plan(MODEL, CLUSTER, request, DATASHEET)


def trained(plan: Plan) -> TrainedRun:
    return TrainedRun(Workload(MODEL, CLUSTER, BATCH, plan.chosen.precision), plan.chosen.layout, plan.chosen.compiled)


def truth(**factors: float) -> Profile:
    """DATASHEET with groups of constants made slower by `factors`."""
    values: dict[str, float] = {}
    for group in GROUPS["cpu"]:
        values |= group.scaled(DATASHEET.constants, factors.get(group.name, 1.0))
    return DATASHEET.changed(values)


def run_folder(
    folder: Path, plan: Plan, profile: Profile, steps: int, trace: bool = True, noise: float = 0.01
) -> RunFolder:
    """A run folder as `train` leaves it, on a machine whose constants are `profile`."""
    run, draw = RunFolder(folder).create(), random.Random(0)
    seconds = _predicted_parts(trained(plan), profile)
    events = []
    for step in range(1, steps + 1):
        slow = 4.0 if step <= 3 else 1.0  # warming up
        step_seconds = seconds["step"] * slow * math.exp(draw.gauss(0, noise))
        run.append_event("step", step=step, step_seconds=step_seconds)
        for rank in range(2):
            for name, value in {"batch": 1e-3, **seconds}.items():
                if name != "step":
                    span = value * slow * math.exp(draw.gauss(0, noise)) * 1e6
                    events.append({"name": name, "ph": "X", "ts": 0, "dur": span, "pid": rank, "args": {"step": step}})
    if trace:
        run.trace.write_text(json.dumps({"traceEvents": events}))
    return run


def test_spans_tell_computing_from_the_network(tmp_path: Path) -> None:
    plan, real = planned(dp=2), truth(computing=1.3, network=3.0)
    found = run_profile(run_folder(tmp_path, plan, real, 40), trained(plan), DATASHEET, "ours")
    assert found.steps == 35
    assert found.factors["computing"] == pytest.approx(1.3, rel=0.1)
    assert found.factors["network"] > 1.8
    before, after = found.parts[0].before, found.parts[0].after
    assert after == pytest.approx(found.parts[0].measured, rel=0.03) and abs(before / after - 1) > 0.05
    low, high = found.interval
    was = DATASHEET.interval("cpu", "meshwright", "node")
    assert was[0] < low < 1 < high < was[1]
    assert found.profile.interval("cpu", "meshwright", "node") == found.interval
    assert {change.constant for change in found.changes} >= {"cpu.product.fp32.share", "cpu.net.all_reduce.share"}


def test_a_corrected_profile_predicts_another_layout_better(tmp_path: Path) -> None:
    plan, real, other = planned(dp=2), truth(computing=1.6, host=1.3, network=1.4), planned(tp=2)
    found = run_profile(run_folder(tmp_path, plan, real, 30), trained(plan), DATASHEET, "ours")
    right, was, now = (
        _predicted_parts(trained(other), profile)["step"] for profile in (real, DATASHEET, found.profile)
    )
    assert abs(now / right - 1) < 0.5 * abs(was / right - 1)


def test_steps_alone_are_enough(tmp_path: Path) -> None:
    plan, real = planned(pp=2), truth(computing=1.4)
    run = run_folder(tmp_path, plan, real, 25, trace=False)
    found = run_profile(run, trained(plan), DATASHEET, "ours")
    assert [part.name for part in found.parts] == ["step"]
    assert found.parts[0].after == pytest.approx(found.parts[0].measured, rel=0.05)


def test_noise_widens_the_interval(tmp_path: Path) -> None:
    plan = planned(dp=2)
    runs = [run_folder(tmp_path / str(noise), plan, DATASHEET, 60, noise=noise) for noise in (0.01, 0.4)]
    quiet, loud = (run_profile(run, trained(plan), DATASHEET, "ours") for run in runs)
    assert loud.interval[0] < quiet.interval[0] and loud.interval[1] > quiet.interval[1]


def test_too_few_steps_are_refused_with_their_number(tmp_path: Path) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 12)
    with pytest.raises(InputError, match="12 steps are too few"):
        run_profile(run, trained(plan), DATASHEET, "ours")


def test_a_broken_trace_is_named(tmp_path: Path) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 25)
    run.trace.write_text("[1, 2")
    with pytest.raises(InputError, match=r"trace\.json"):
        run_profile(run, trained(plan), DATASHEET, "ours")


def rewrite(run: RunFolder, steps: range, seconds: Any) -> None:
    """Puts `seconds` into the lines of some steps of the log."""
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    for event in events:
        if event["step"] in steps:
            event["step_seconds"] = seconds
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize("seconds", [-1, 0, "x", None, True, [1], math.nan, math.inf, 10**400])
@pytest.mark.parametrize("step", [2, 17])
def test_a_step_that_took_no_time_is_named_with_its_line(tmp_path: Path, step: int, seconds: Any) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 25)
    again = len(run.read_events()) + 2
    run.append_event("eval", step=17)
    run.append_event("step", step=step, step_seconds=1.0)  # a resumed run did it again: this line counts
    rewrite(run, range(step, step + 1), seconds)
    with pytest.raises(
        InputError, match=rf"events\.jsonl:{again}: step_seconds is .*; a step takes seconds above zero"
    ):
        run_profile(run, trained(plan), DATASHEET, "ours")


@pytest.mark.parametrize(
    ("factor", "unit"),
    [(1e3, "milliseconds"), (1e6, "microseconds"), (1e9, "nanoseconds"), (1 / 3600, "hours"), (1e-300, "whole step$")],
)
def test_steps_in_another_unit_are_refused_with_its_name(tmp_path: Path, factor: float, unit: str) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 25, trace=False)
    rewrite(run, range(1, 100), 1.3 * factor * _predicted_parts(trained(plan), DATASHEET)["step"])
    with pytest.raises(InputError, match=rf"events\.jsonl: the median step took .* that are predicted; give .*{unit}"):
        run_profile(run, trained(plan), DATASHEET, "ours")


@pytest.mark.parametrize("duration", [-5.0, "x", None, math.nan, math.inf, 10**400])
def test_a_span_without_a_time_is_named(tmp_path: Path, duration: Any) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 25)
    trace = json.loads(run.trace.read_bytes())
    trace["traceEvents"][40]["dur"] = duration
    run.trace.write_text(json.dumps(trace))
    with pytest.raises(InputError, match=r"trace\.json: traceEvents\[40\]: dur is .*; a span takes microseconds"):
        run_profile(run, trained(plan), DATASHEET, "ours")


@pytest.mark.parametrize("duration", [0, 1e-300, 1e15])
def test_spans_that_cannot_be_of_the_step_are_refused(tmp_path: Path, duration: float) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 25)
    trace = json.loads(run.trace.read_bytes())
    for event in trace["traceEvents"]:
        if event["name"] == "forward":
            event["dur"] = duration
    run.trace.write_text(json.dumps(trace))
    with pytest.raises(InputError, match=r"trace\.json: the median forward took .*; dur is in microseconds"):
        run_profile(run, trained(plan), DATASHEET, "ours")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"traceEvents": [{"ph": "X", "args": {"step": 1e400}, "name": "a"}]}']
)
def test_a_trace_that_breaks_its_reader_is_named(tmp_path: Path, text: str) -> None:
    plan = planned(dp=2)
    run = run_folder(tmp_path, plan, DATASHEET, 25)
    run.trace.write_text(text)
    with pytest.raises(InputError, match=r"trace\.json: is not a trace"):
        run_profile(run, trained(plan), DATASHEET, "ours")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dp": -1}, r"chosen\.layout: dp below 1"),
        ({"dp": 0}, r"chosen\.layout: dp below 1"),
        ({"dp": "x"}, r"chosen\.layout\.dp is 'x'"),
        ({"tp": None}, r"chosen\.layout\.tp is None"),
        ({"dp": 8}, "is 8, not 2 devices"),
        ({"micro_batch": 7}, "not a multiple"),
        ({"schedule": "zz"}, "schedule 'zz'"),
    ],
)
def test_a_plan_that_cannot_have_run_here_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    plan = planned(dp=2)
    run, right = run_folder(tmp_path, plan, DATASHEET, 25), trained(plan)
    wrong = replace(right, layout=replace(right.layout, **change))
    with pytest.raises(InputError, match=rf"plan\.json: .*{says}"):
        run_profile(run, wrong, DATASHEET, "ours")


def test_a_precision_or_prediction_that_is_none_is_refused(tmp_path: Path) -> None:
    plan = planned(dp=2)
    run, right = run_folder(tmp_path, plan, DATASHEET, 25), trained(plan)
    for wrong in (replace(right, workload=replace(right.workload, precision="fp9")), replace(right, predicted=-1.0)):
        with pytest.raises(InputError, match=r"plan\.json: chosen\.pre"):
            run_profile(run, wrong, DATASHEET, "ours")
    assert run_profile(run, replace(right, predicted=0.1), DATASHEET, "ours").steps == 20


def test_no_factor_takes_a_constant_where_no_profile_may_have_it(tmp_path: Path) -> None:
    """Shares of a ceiling stay below the whole however much quicker a run was than predicted."""
    groups = {group.name: group for group in GROUPS["cuda"]}
    quick = groups["computing"].scaled(DATASHEET.constants, 1 / 3)
    assert (quick["cuda.product.share"], quick["cuda.attention.share"]) == (1.0, 3.0)
    DATASHEET.changed(quick).save(tmp_path / "p.toml")
    assert load_profile(tmp_path / "p.toml")["cuda.product.share"] == 1.0
