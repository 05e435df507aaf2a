"""A serving plan on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshwright.plan.serving import ServingPlan
from meshwright.plan.serving.result import BINDING

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.plan.result import Interval

GIB = 1024**3
OTHERS_SHOWN = 3
REJECTED_SHOWN = 4


def show_serving_plan(plan: ServingPlan, console: Console) -> None:
    """The verdict, what a caller sees of it, where memory and time go, and what lost."""
    chosen, figures, target = plan.chosen, plan.chosen.predicted, plan.target
    width = min(console.width, 100)

    def line(name: str, text: str) -> None:
        console.print(f"{name:<9} {_plain(text)}", width=width)

    console.print(f"[bold green]SERVES[/bold green]    {_plain(plan.model)} on {_plain(plan.cluster)}", width=width)
    split = f"tensor parallel {chosen.tp}, pipeline {chosen.pp}, replicas {chosen.replicas}: {chosen.devices} devices"
    line("layout", f"{split}; weights in {chosen.precision}, up to {chosen.max_batch} sequences a replica")
    wish = [f"{key}={getattr(target, key):g}" for key in target.goals]
    line("requests", f"{target.prompt_tokens} tokens in, {target.output_tokens} out; wanted: {', '.join(wish) or '-'}")
    line("first", f"{_seconds(figures.ttft_seconds)} to the first token")
    line("token", f"{_seconds(figures.tpot_seconds)} from one token to the next")
    line("speed", f"{_rate(figures.tokens_per_second)} tokens/s, {_rate(figures.requests_per_second)} requests/s")
    if figures.dollars_per_million_tokens is not None:
        line("cost", f"${figures.dollars_per_million_tokens:.2f} for a million tokens given out")
    memory = chosen.memory
    pages = f"{memory.pages:,} pages of {memory.page_tokens}" if memory.page_tokens else "slots"
    line(
        "memory",
        f"a device: weights {memory.weights / GIB:.2f} GiB, keys and values {memory.cache / GIB:.2f} GiB "
        f"({memory.tokens:,} tokens in {pages}, {memory.sequences:,} such requests at most), "
        f"of {memory.usable / GIB:.1f} GiB that may be filled",
    )
    parts = sorted(chosen.breakdown.items(), key=lambda item: -item[1])
    whole = sum(chosen.breakdown.values())
    line(
        "time",
        ", ".join(f"{BINDING[part]} {seconds / whole:.0%}" for part, seconds in parts if seconds > 0.005 * whole),
    )
    line("why", chosen.why)
    for other in plan.runners_up[:OTHERS_SHOWN]:
        line("next", f"{other}: {other.why}")
    for way, reason in plan.rejected[:REJECTED_SHOWN]:
        line("not", f"{way}: {reason}")
    if plan.assumed:
        console.print(f"[dim]assumed: {_plain('; '.join(plan.assumed))}[/dim]", width=width)


def _seconds(interval: Interval) -> str:
    return f"{_time(interval.mid)} (90 %: {_time(interval.low)} to {_time(interval.high)})"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _rate(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.mid:,.3g}" if interval.mid < 100 else f"{interval.mid:,.0f}"
    low, mid, high = (f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in (interval.low, interval.mid, interval.high))
    return f"{mid} (90 %: {low} to {high})"


def _plain(text: str) -> str:
    """Text with nothing in it that rich would take for markup."""
    return text.replace("[", r"\[")
