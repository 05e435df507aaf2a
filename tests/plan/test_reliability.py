"""Reliability and money: against a simulation of failures, the papers' formulas, and the run of Llama 3 405B."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster import cpu_cluster, named_cluster
from meshwright.plan.reliability import Reliability, best_interval, goodput, run_forecast, spare_nodes

HOUR = 3600.0


def simulated_goodput(
    interval: float, stall: float, durable: float, restart: float, mtbf: float, failures: int, seed: int
) -> float:
    """The same run, event by event with random failures; shares nothing with the formula."""
    draw = random.Random(seed)
    useful = elapsed = 0.0
    for _ in range(failures):
        life = draw.expovariate(1 / mtbf)
        elapsed += life
        clock = safe = done = 0.0
        while True:  # work, stall, work, ... until the failure; a state counts once it is written
            clock += interval + stall
            done += interval
            if clock + durable > life:
                break
            safe = done
        useful += safe
        while True:  # a restart may fail too
            strike = draw.expovariate(1 / mtbf)
            elapsed += min(strike, restart)
            if strike >= restart:
                break
    return useful / elapsed


@pytest.mark.parametrize(
    ("interval", "stall", "durable", "restart", "mtbf"),
    [
        (600.0, 20.0, 0.0, 300.0, 3 * HOUR),
        (200.0, 1.0, 60.0, 400.0, 3 * HOUR),
        (1800.0, 30.0, 600.0, 900.0, 1.5 * HOUR),  # writing takes long, and half the lives end before the second state
    ],
)
def test_goodput_is_what_a_simulation_gives(
    interval: float, stall: float, durable: float, restart: float, mtbf: float
) -> None:
    ours = goodput(interval, stall_seconds=stall, durable_seconds=durable, restart_seconds=restart, mtbf_seconds=mtbf)
    assert ours == pytest.approx(simulated_goodput(interval, stall, durable, restart, mtbf, 40_000, seed=1), rel=0.01)


def test_without_a_write_in_the_background_it_is_dalys_complete_model() -> None:
    interval, stall, restart, mtbf = 900.0, 40.0, 200.0, 2 * HOUR
    wall = mtbf * math.exp(restart / mtbf) * math.expm1((interval + stall) / mtbf) / interval
    ours = goodput(interval, stall_seconds=stall, durable_seconds=0.0, restart_seconds=restart, mtbf_seconds=mtbf)
    assert ours == pytest.approx(1 / wall)


def young_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Young's first-order interval (1974)."""
    return math.sqrt(2 * stall_seconds * mtbf_seconds)


def daly_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """Daly's higher-order interval (2006, equation 37): mtbf where a stall takes twice that or more."""
    if stall_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    x = stall_seconds / (2 * mtbf_seconds)
    return young_seconds(stall_seconds, mtbf_seconds) * (1 + math.sqrt(x) / 3 + x / 9) - stall_seconds


@given(stall=st.floats(0.1, 300), hours=st.floats(1, 1000))
def test_the_best_interval_is_dalys(stall: float, hours: float) -> None:
    best = best_interval(stall_seconds=stall, durable_seconds=0.0, mtbf_seconds=hours * HOUR, least_seconds=0.01)
    assert best == pytest.approx(daly_seconds(stall, hours * HOUR), rel=0.02)
    assert best == pytest.approx(young_seconds(stall, hours * HOUR), rel=0.35)


@given(
    stall=st.floats(0.1, 100),
    durable=st.floats(0, 600),
    hours=st.floats(0.5, 500),
    other=st.floats(0.3, 3),
)
def test_no_other_interval_is_better(stall: float, durable: float, hours: float, other: float) -> None:
    mtbf = hours * HOUR
    best = best_interval(stall_seconds=stall, durable_seconds=durable, mtbf_seconds=mtbf, least_seconds=1.0)
    parts = {"stall_seconds": stall, "durable_seconds": durable, "restart_seconds": 60.0, "mtbf_seconds": mtbf}
    assert goodput(best, **parts) >= goodput(max(1.0, best * other), **parts) - 1e-9


def test_llama_3_405b_on_16384_h100() -> None:
    """54 days, 419 unexpected interruptions, more than 90 % effective (arXiv 2407.21783, section 3.3.4)."""
    cluster = named_cluster("h100-sxm-80gb", 16_384, 8)
    step_seconds = 6.2  # 2,048 sequences of 8,192 tokens at the 400 TFLOP/s a device that the paper states
    steps = int(54 * 86_400 * 0.95 / step_seconds)
    forecast = run_forecast(parameters=405_850_000_000, cluster=cluster, step_seconds=step_seconds, steps=steps)
    assert forecast.mtbf_hours == pytest.approx(3.09, rel=0.01)
    assert forecast.failures == pytest.approx(419, rel=0.05)
    assert 0.90 < forecast.goodput < 0.97
    assert forecast.spare_nodes >= 6, "about eight nodes fail a day, and are away for one"
    spot = run_forecast(parameters=405_850_000_000, cluster=cluster, step_seconds=step_seconds, steps=steps, spot=True)
    assert spot.goodput < forecast.goodput
    assert spot.checkpoint_seconds < forecast.checkpoint_seconds
    assert forecast.dollars and spot.dollars and spot.dollars < forecast.dollars


def test_a_run_shorter_than_the_interval_saves_once() -> None:
    cluster = named_cluster("h100-sxm-80gb", 8)
    forecast = run_forecast(parameters=10**9, cluster=cluster, step_seconds=0.5, steps=100)
    assert forecast.checkpoint_steps == 100
    assert forecast.goodput > 0.9
    assert forecast.spare_nodes == 0


def test_a_kill_costs_a_few_minutes_or_what_storage_takes() -> None:
    cluster = named_cluster("h100-sxm-80gb", 8)
    for on in (cluster, cpu_cluster(2)):
        small = run_forecast(parameters=10**7, cluster=on, step_seconds=0.03, steps=100_000)
        assert small.checkpoint_seconds <= 180
        assert small.goodput > 0.97
    large = run_forecast(parameters=70 * 10**9, cluster=cluster, step_seconds=5.0, steps=100_000)
    assert large.checkpoint_seconds > 10 * large.durable_seconds * 0.99, "writing must not fill the storage's time"


def test_waiting_for_the_write_costs() -> None:
    cluster = named_cluster("h100-sxm-80gb", 64)
    slow = run_forecast(parameters=70 * 10**9, cluster=cluster, step_seconds=5.0, steps=100_000, asynchronous=False)
    fast = run_forecast(parameters=70 * 10**9, cluster=cluster, step_seconds=5.0, steps=100_000)
    assert slow.stall_seconds > 10 * fast.stall_seconds
    assert slow.goodput < fast.goodput


def test_a_pinned_interval_is_kept_and_costs_what_it_costs() -> None:
    cluster = named_cluster("h100-sxm-80gb", 64)
    run = {"parameters": 70 * 10**9, "cluster": cluster, "step_seconds": 60.0, "steps": 10_000}
    best, each, never = (run_forecast(**run, every=every) for every in (None, 1, 0))
    assert 1 < best.checkpoint_steps < 10_000
    assert (each.checkpoint_steps, never.checkpoint_steps) == (1, 10_000)
    assert best.goodput > max(each.goodput, never.goodput)
    # a step takes 60 s and writing 105 s: each checkpoint waits for the one before it
    assert each.stall_seconds == pytest.approx(70e9 * 12 / 8 / 1e9 - 60)
    assert never.lost_work_seconds > 100 * best.lost_work_seconds
    assert each.dollars and best.dollars and each.dollars > best.dollars


def test_goodput_is_bounded_by_how_often_others_fail() -> None:
    cluster = named_cluster("h100-sxm-80gb", 16_384, 8)
    run = {"parameters": 405_850_000_000, "cluster": cluster, "step_seconds": 6.2}
    forecast = run_forecast(**run)
    low, high = forecast.goodput_interval
    assert low < forecast.goodput < high
    often = run_forecast(**run, every=forecast.checkpoint_steps, reliability=Reliability(6.5, 6.5, 6.5))
    assert often.goodput == pytest.approx(low)
    assert often.goodput_interval == (often.goodput, often.goodput), "a stated rate has no interval"


def test_nothing_fails() -> None:
    cluster = named_cluster("h100-sxm-80gb", 64)
    never = Reliability(0.0, 0.0, 0.0)
    forecast = run_forecast(parameters=10**9, cluster=cluster, step_seconds=1.0, steps=1000, reliability=never)
    assert forecast.checkpoint_steps == 180, "a person may still end it: a kill costs three minutes at most"
    assert forecast.failures == 0.0
    assert forecast.spare_nodes == 0


@given(nodes=st.integers(2, 20_000), per_day=st.floats(1e-4, 0.05), days=st.floats(0.1, 5))
def test_spares_leave_a_shortage_of_one_in_a_hundred(nodes: int, per_day: float, days: float) -> None:
    count = spare_nodes(nodes, per_day / 86_400, days * 86_400)
    mean = nodes * per_day * days

    def beyond(spares: int) -> float:
        logs = [k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(spares + 1)]
        return 1 - sum(map(math.exp, logs))

    assert beyond(count) <= 0.012
    assert count == 0 or beyond(count - 1) > 0.008
