"""A run's steps and spans move the constants that they speak of."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from meshwright.cluster import Cluster, Device, Link
from meshwright.errors import InputError
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import Plan, PlanRequest, make_plan
from meshwright.plan.from_run import GROUPS, Ran, _parts, run_profile
from meshwright.plan.profile import DATASHEET, Profile
from meshwright.run import RunFolder

MODEL = card(LlamaShape(layers=4, hidden=256, heads=8, kv_heads=8, head_dim=32, ffn=704, vocab=2048), seq_len=128)
CORE = Device("core", "cpu", 10**10, {"fp32": 1e11, "bf16": 4e11}, 3e10, 6e-6, units=1)
LINK = Link("gloo", 1e9, 0.35e-3, topology="host")
CLUSTER = Cluster(CORE, 2, 2, LINK, LINK)
BATCH = 16


def planned(**pins: int) -> Plan:
    request = PlanRequest(BATCH, precision="fp32", pins=pins, compile=False)
    return make_plan(MODEL, CLUSTER, request, DATASHEET)


def what(plan: Plan) -> Ran:
    return Ran(MODEL, CLUSTER, BATCH, plan.chosen.layout, plan.chosen.precision, plan.chosen.compiled)


def truth(**factors: float) -> Profile:
    """DATASHEET with groups of constants taking so many times as long."""
    values: dict[str, float] = {}
    for group in GROUPS["cpu"]:
        values |= group.scaled(DATASHEET.constants, factors.get(group.name, 1.0))
    return DATASHEET.changed(values)


def ran(folder: Path, plan: Plan, profile: Profile, steps: int, trace: bool = True, noise: float = 0.01) -> RunFolder:
    """A run folder as `train` leaves it, on a machine whose constants are `profile`."""
    run, draw = RunFolder(folder).create(), random.Random(0)
    seconds = _parts(what(plan), profile)
    events = []
    for step in range(1, steps + 1):
        slow = 4.0 if step <= 3 else 1.0  # warming up
        said = seconds["step"] * slow * math.exp(draw.gauss(0, noise))
        run.append_event("step", step=step, step_seconds=said)
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
    found = run_profile(ran(tmp_path, plan, real, 40), what(plan), DATASHEET, "ours")
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


def test_a_corrected_profile_foretells_another_layout_better(tmp_path: Path) -> None:
    plan, real, other = planned(dp=2), truth(computing=1.6, host=1.3, network=1.4), planned(tp=2)
    found = run_profile(ran(tmp_path, plan, real, 30), what(plan), DATASHEET, "ours")
    right, was, now = (_parts(what(other), profile)["step"] for profile in (real, DATASHEET, found.profile))
    assert abs(now / right - 1) < 0.5 * abs(was / right - 1)


def test_steps_alone_are_enough(tmp_path: Path) -> None:
    plan, real = planned(pp=2), truth(computing=1.4)
    run = ran(tmp_path, plan, real, 25, trace=False)
    found = run_profile(run, what(plan), DATASHEET, "ours")
    assert [part.name for part in found.parts] == ["step"]
    assert found.parts[0].after == pytest.approx(found.parts[0].measured, rel=0.05)


def test_noise_widens_the_interval(tmp_path: Path) -> None:
    plan = planned(dp=2)
    quiet, loud = (
        run_profile(
            ran(tmp_path / str(noise), plan, DATASHEET, 60, noise=noise),
            what(plan), DATASHEET, "ours")
        for noise in (0.01, 0.4)
    )  # fmt: skip
    assert loud.interval[0] < quiet.interval[0] and loud.interval[1] > quiet.interval[1]


def test_too_few_steps_are_refused_with_their_number(tmp_path: Path) -> None:
    plan = planned(dp=2)
    run = ran(tmp_path, plan, DATASHEET, 12)
    with pytest.raises(InputError, match="12 steps are too few"):
        run_profile(run, what(plan), DATASHEET, "ours")


def test_a_broken_trace_is_said(tmp_path: Path) -> None:
    plan = planned(dp=2)
    run = ran(tmp_path, plan, DATASHEET, 25)
    run.trace.write_text("[1, 2")
    with pytest.raises(InputError, match=r"trace\.json"):
        run_profile(run, what(plan), DATASHEET, "ours")
