"""A serving plan on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.cluster import GIB
from meshwright.plan.serving import ServingPlan
from meshwright.plan.serving.result import BINDING
from meshwright.report.terminal import escaped, show_line

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.plan.result import Interval

OTHERS_SHOWN = 3
REJECTED_SHOWN = 4


def show_serving_plan(plan: ServingPlan, console: Console) -> None:
    """The layout, what a client will see of it, its memory and time, and why the other layouts lost."""
    chosen, figures, target = plan.chosen, plan.chosen.predicted, plan.target

    def line(label: str, text: str, style: str = "") -> None:
        show_line(console, label, escaped(text), label_width=10, style=style)

    line("SERVES", f"{plan.model} on {plan.cluster}", "bold green")
    split = f"tp {chosen.tp}, pp {chosen.pp}, replicas {chosen.replicas}, devices {chosen.devices}"
    line("layout", f"{split}; weights in {chosen.precision}, up to {chosen.max_batch} sequences per replica")
    goals = ", ".join(f"{key}={getattr(target, key):g}" for key in target.goals) or "none"
    line("requests", f"{target.prompt_tokens} prompt tokens, {target.output_tokens} output tokens; target: {goals}")
    line("ttft", f"{_seconds(figures.ttft_seconds)} to the first token")
    line("tpot", f"{_seconds(figures.tpot_seconds)} per further token")
    line("speed", f"{_rate(figures.tokens_per_second)} tokens/s, {_rate(figures.requests_per_second)} requests/s")
    if figures.dollars_per_million_tokens is not None:
        line("cost", f"${figures.dollars_per_million_tokens:.2f} per million output tokens")
    memory = chosen.memory
    pages = f"{memory.pages:,} pages of {memory.page_tokens}" if memory.page_tokens else "slots"
    line(
        "memory",
        f"per device: weights {memory.weights / GIB:.2f} GiB, keys and values {memory.cache / GIB:.2f} GiB "
        f"({memory.tokens:,} tokens in {pages}, at most {memory.sequences:,} such requests), "
        f"of {memory.usable / GIB:.1f} GiB usable",
    )
    parts = sorted(chosen.breakdown.items(), key=lambda item: -item[1])
    total = sum(chosen.breakdown.values())
    line("time", ", ".join(f"{BINDING[part]} {size / total:.0%}" for part, size in parts if size > 0.005 * total))
    line("why", chosen.why)
    for other in plan.runners_up[:OTHERS_SHOWN]:
        line("runner-up", f"{other}: {other.why}")
    for way, reason in plan.rejected[:REJECTED_SHOWN]:
        line("rejected", f"{way}: {reason}")
    if plan.assumed:
        line("assumed", "; ".join(plan.assumed), "dim")


def _seconds(interval: Interval) -> str:
    return f"{_time(interval.mid)} (90 %: {_time(interval.low)} to {_time(interval.high)})"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _rate(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.mid:,.3g}" if interval.mid < 100 else f"{interval.mid:,.0f}"
    low, mid, high = (f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in (interval.low, interval.mid, interval.high))
    return f"{mid} (90 %: {low} to {high})"
