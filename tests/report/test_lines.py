"""What a plan says of failures, money and what would help."""

from __future__ import annotations

from meshwright.cluster import named_cluster
from meshwright.families.llama.card import LlamaShape, card
from meshwright.plan import Plan, PlanRequest, make_plan
from meshwright.plan.advice import DataVolume, FrameworkPlan, advise, frameworks, situation_of
from meshwright.report.lines import advice_lines, cost_line, duration, failure_line, what_if_lines

SHAPE = LlamaShape(layers=16, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=8192, vocab=32000)


def plan(devices: int, steps: int = 0, name: str = "h100-sxm-80gb") -> Plan:
    return make_plan(card(SHAPE, 2048), named_cluster(name, devices), PlanRequest(1024, steps=steps))


def test_a_long_run_on_many_nodes_says_how_to_survive() -> None:
    planned = plan(512, steps=400_000)
    assert planned.outlook is not None and planned.outlook.dollars is not None
    line = failure_line(planned)
    assert f"save every {planned.outlook.checkpoint_steps:,} steps" in line
    assert "spare node" in line and "goodput 9" in line
    cost = cost_line(planned)
    assert "the run takes" in cost and f"${planned.outlook.dollars:,.2f} (90 %" in cost and "on demand" in cost


def test_a_run_that_fails_faster_than_it_saves_is_said_not_to_end() -> None:
    request = PlanRequest(1024, steps=1000, failures_per_1000_node_days=1e6)
    planned = make_plan(card(SHAPE, 2048), named_cluster("h100-sxm-80gb", 512), request)
    assert planned.outlook is not None
    assert planned.outlook.dollars is None and planned.outlook.elapsed_seconds is None
    assert "would not end" in failure_line(planned) and "one every 1 s" in failure_line(planned)
    assert "no price" not in cost_line(planned)


def test_a_run_that_hardly_ever_fails_says_nothing_of_it() -> None:
    assert failure_line(plan(8, steps=100)) == ""


def test_without_a_price_no_dollars() -> None:
    assert cost_line(plan(8, steps=10, name="mi300x")).endswith("no price known")


def test_what_would_help_most_comes_first() -> None:
    planned = plan(8)
    lines = what_if_lines(planned)
    assert len(lines) <= 3
    best = max((one.saves for one in planned.buys), default=0.0)
    assert not lines or f"{best:.0%} less" in lines[0]


def test_durations_have_two_units() -> None:
    assert [duration(s) for s in (5, 65, 3700, 54 * 86400 + 3 * 3600)] == [
        "5 s",
        "1 min 05 s",
        "1 h 01 min",
        "54 d 3 h",
    ]


def test_advice_is_one_line_a_reason() -> None:
    layout, reading = plan(8).chosen.layout, DataVolume("corpus", "tokens", 1024 * 2048, 10)
    cluster = named_cluster("h100-sxm-80gb", 8)
    facts = situation_of(card(SHAPE, 2048), cluster, reading, built_in=True, experience="expert")
    found = advise(facts, {row: FrameworkPlan(row, 1.0, layout) for row in frameworks(facts)})
    lines = advice_lines(found)
    assert len(lines) == len(found.strategies) + len(found.tools)
    assert lines[len(found.strategies)].startswith("use Meshwright: predicted 1 s a step as ")
    assert any(line.startswith("or Megatron-LM, Megatron Bridge: predicted") for line in lines)
    assert any(line.startswith("not Horovod") for line in lines)
