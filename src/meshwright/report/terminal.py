"""What a person sees in a terminal: a plan on one screen, a run's live line, and what `doctor` found."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshwright.plan import Plan
from meshwright.report.outlook import cost_line, duration, failure_line, share_lines, what_if_lines
from meshwright.report.timeline import MOST_MICRO_BATCHES, text_rows

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.run import RunFolder

GIB = 1024**3
#: What memory is for, with the mark and the colour of its part of a bar. The marks tell apart without colour too.
PARTS = (
    ("weights", "█", "blue"),
    ("gradients", "▓", "yellow"),
    ("optimizer", "▒", "magenta"),
    ("activations", "░", "green"),
    ("other", "·", "white"),
)
STAGES_SHOWN = 6
REJECTED_SHOWN = 2
RUNNERS_UP_SHOWN = 3
PLAIN_LINE_SECONDS = 10.0
RECENT_STEPS = 20


def show_plan(plan: Plan, console: Console) -> None:
    """The verdict on one screen of 80 x 40: does it fit, how long, where the memory goes, and what lost and why."""
    width = min(console.width, 100)
    _show_verdict(plan, console, width)
    _show_memory(plan, console, width)
    if plan.chosen.layout.pp > 1:
        _show_timeline(plan, console, width)
    _show_others(plan, console, width)
    for line in what_if_lines(plan):
        console.print(f"what if {_plain(line)}", width=width)
    if plan.assumed:
        console.print(f"[dim]assumed: {_plain('; '.join(plan.assumed))}[/dim]", width=width)


def _plain(text: str) -> str:
    """Text with nothing in it that rich would take for markup."""
    return text.replace("[", r"\[")


def _show_verdict(plan: Plan, console: Console, width: int) -> None:
    chosen, predicted = plan.chosen, plan.chosen.predicted
    layout, seconds = chosen.layout, predicted.step_seconds
    model = f"{_plain(plan.model)}, {count(plan.parameters)} parameters, on {_plain(plan.cluster)}"
    console.print(f"[bold green]FITS[/bold green]  {model}")
    console.print(
        f"layout  [bold]{layout}[/bold], {chosen.precision}{', compiled' if chosen.compiled else ''}; {_batch(plan)}"
    )
    console.print(
        f"step    [bold]{seconds.mid:.3g} s[/bold] (90 %: {seconds.low:.3g} to {seconds.high:.3g}), "
        f"{predicted.tokens_per_second:,.0f} {plan.unit}/s, {predicted.mfu:.0%} of peak; bound by {chosen.binding}"
    )
    console.print(f"cost    {_plain(cost_line(plan))}", width=width)
    if failures := failure_line(plan):
        console.print(f"faults  {failures}", width=width)
    for line in share_lines(plan):
        console.print(f"share   {_plain(line)}", width=width)
    console.print(f"why     {_plain(chosen.why)}" + (f"; {_plain(plan.limit)}" if plan.limit else ""), width=width)
    console.print()


def _batch(plan: Plan) -> str:
    """How a batch is cut up; where groups of devices have shares of their own, their lines say it."""
    chosen, samples = plan.chosen, plan.global_batch
    if plan.has_batch_shares:
        return f"a batch of {samples}, shared out"
    layout = chosen.layout
    return f"a batch of {samples} = {layout.dp} x {layout.micro_batch} x {chosen.micro_batches} micro-batches"


def _show_memory(plan: Plan, console: Console, width: int) -> None:
    """A bar a stage, drawn to the fullest one; of many stages the ends and the fullest."""
    stages = plan.chosen.memory
    most = max(stage.total for stage in stages)
    have = plan.device_bytes
    bar_width = max(20, width - 36)
    key = "  ".join(f"[{colour}]{mark}[/{colour}] {name}" for name, mark, colour in PARTS)
    bounds = plan.chosen.predicted.intervals.get("peak_bytes")
    sure = f" (90 %: {bounds[0] / GIB:.3g} to {bounds[1] / GIB:.3g})" if bounds else ""
    console.print(f"memory  {most / GIB:.3g} GiB on the fullest device{sure}, of {have / GIB:.1f}")
    console.print(f"        {key}")
    for stage in shown_stages([stage.total for stage in stages]):
        if stage is None:
            console.print("  ...")
            continue
        memory = stages[stage]
        bar = "".join(
            f"[{colour}]{mark * cells}[/{colour}]"
            for (name, mark, colour), cells in zip(
                PARTS, _cells([getattr(memory, name) for name, _, _ in PARTS], most, bar_width), strict=True
            )
        )
        names, *more = plan.chosen.parts(stage)
        blocks = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        blocks += f" +{len(more)}" if more else ""
        amount = f"{memory.total / GIB:.2f} GiB {memory.total / have:.0%}"
        console.print(f"  {stage:>3} {_plain(blocks):<14.14} {bar} {amount}", no_wrap=True, overflow="crop")
    console.print()


def _cells(parts: list[int], whole: int, width: int) -> list[int]:
    """Characters of each part of a bar `width` long for `whole`; rounded so that their sum stays right."""
    cells, before, total = [], 0, 0
    for part in parts:
        total += part
        after = round(total / whole * width)
        cells.append(after - before)
        before = after
    return cells


def shown_stages(totals: list[int]) -> list[int | None]:
    """Stages to show: all of a few; of many the first ones, the fullest and the last, with None for those left out."""
    if len(totals) <= STAGES_SHOWN:
        return list(range(len(totals)))
    fullest = max(range(len(totals)), key=lambda stage: totals[stage])
    keep = sorted({0, 1, 2, fullest, len(totals) - 2, len(totals) - 1})
    shown: list[int | None] = []
    for before, stage in zip([-1, *keep], keep, strict=False):
        shown += [None, stage] if stage > before + 1 else [stage]
    return shown


def _show_timeline(plan: Plan, console: Console, width: int) -> None:
    chosen = plan.chosen
    timeline = chosen.timeline(MOST_MICRO_BATCHES)
    shown = len({event.micro_batch for event in timeline.events})
    some = "" if chosen.micro_batches == shown else f", its first {shown} micro-batches"
    idle = chosen.predicted.breakdown["bubble"] / chosen.predicted.step_seconds.mid
    late = ", + weights' gradients" if any(event.kind == "W" for event in timeline.events) else ""
    console.print(f"pipeline, {idle:.0%} of the step idle{some}: digits forward, letters backward{late}")
    rows = text_rows(timeline, width - 6)
    for stage in shown_stages([0] * len(rows)):
        console.print("  ..." if stage is None else f"  {stage:>3} {rows[stage]}", no_wrap=True, overflow="crop")
    console.print()


def _show_others(plan: Plan, console: Console, width: int) -> None:
    from rich.table import Table

    if plan.runners_up:
        table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", width=width)
        for name in ("runners-up", "step", "peak", "why it lost"):
            table.add_column(name, no_wrap=name in ("step", "peak"))
        for choice in plan.runners_up[:RUNNERS_UP_SHOWN]:
            predicted = choice.predicted
            cells = (str(choice.layout), f"{predicted.step_seconds.mid:.3g} s", f"{predicted.peak_bytes / GIB:.2f} GiB")
            table.add_row(*cells, _plain(choice.why))
        console.print(table)
    for lost in plan.rejected[:REJECTED_SHOWN]:
        console.print(f"cannot  {lost.layout}: {_plain(lost.reason)}", width=width)
    if len(plan.rejected) > REJECTED_SHOWN:
        console.print(f"        and {len(plan.rejected) - REJECTED_SHOWN} more: meshwright plan --json")


def count(number: float) -> str:
    """A count in three digits: 2.36 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


@dataclass
class Progress:
    """What the live line says, gathered from the lines of a run's event log."""

    steps: int = 0
    step: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def take(self, event: Mapping[str, Any]) -> str | None:
        """Takes in an event; returns what to say of it beside the line, if anything."""
        kind = event["event"]
        if kind == "step":
            self.step = dict(event)
            self.recent_seconds.append(event["step_seconds"])
            return None
        if kind == "start":
            self.steps = event.get("steps", self.steps)
            return None
        if kind == "eval":
            skip = ("event", "time", "step")
            self.held_out = {k: v for k, v in event.items() if k not in skip and isinstance(v, int | float)}
            return f"step {event['step']}: held out: {_figures(self.held_out)}"
        if kind == "checkpoint":
            return f"step {event['step']}: checkpoint"
        if kind in ("failure", "recovery"):
            shown = [f"{key} {value}" for key, value in event.items() if key not in ("event", "time")]
            return f"{kind}: " + ", ".join(shown)
        return None

    def line(self, unit: str) -> str:
        """Step, loss, held-out figures, speed, measured against predicted, time left."""
        if not self.step:
            return "starting"
        step = self.step["step"]
        seconds = statistics.median(self.recent_seconds)
        words = [f"step {step}/{self.steps or '?'}", f"loss {self.step['loss']:.4f}"]
        if self.held_out:
            words.append(f"held out {_figures(dict(list(self.held_out.items())[:1]))}")
        words.append(f"{self.step['tokens_per_second']:,.0f} {unit}/s")
        predicted = self.step.get("predicted_step_seconds")
        words.append(f"{seconds:.3g} s a step" + (f" (predicted {predicted:.3g})" if predicted else ""))
        if self.steps:
            words.append(f"{duration((self.steps - step) * seconds)} left")
        return "  ".join(words)


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('held_out_', '').replace('_', ' ')} {value:.4g}" for name, value in values.items())


def live(folder: RunFolder, plan: Plan, until: Callable[[], bool], console: Console | None = None) -> None:
    """Follows a run's events until `until()` is true: one line that stays in place in a terminal, elsewhere a plain
    line now and then. Writes to stderr unless given a console."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = console or Console(file=sys.stderr, highlight=False)
    progress = Progress()
    terminal = console.is_terminal
    printed_at = time.monotonic()
    view = Live(console=console, refresh_per_second=4, transient=False) if terminal else nullcontext()
    with view as shown:
        for event in folder.tail(until, from_end=True):
            remark = progress.take(event)
            if remark:
                console.print(remark, markup=False)
            if shown is not None:
                shown.update(Text(progress.line(plan.unit), no_wrap=True, overflow="ellipsis"))
            elif event["event"] == "step" and _line_due(event, progress, printed_at):
                printed_at = time.monotonic()
                console.print(progress.line(plan.unit), markup=False, soft_wrap=True)


def _line_due(event: Mapping[str, Any], progress: Progress, printed_at: float) -> bool:
    """Whether a plain line is worth printing: the first step, the last, and every ten seconds."""
    first = len(progress.recent_seconds) == 1
    return first or event["step"] == progress.steps or time.monotonic() - printed_at >= PLAIN_LINE_SECONDS


def show_doctor(found: Mapping[str, Any], console: Console) -> None:
    """What `doctor` found: the machine, its speeds, every socket, and what is wrong."""
    cpu, memory = found["cpu"], found["memory"]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    rows = [
        ("meshwright", f"{found['meshwright']}, Python {found['python']['version']}, {found['platform']}"),
        ("packages", packages),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['instructions'])}"),
        ("memory", f"{memory['total_bytes'] / GIB:.1f} GiB"),
        ("plans for", found["cluster"]),
    ]
    for place, disk in found["disk"].items():
        rows.append((f"disk {place}", f"{disk['free_bytes'] / GIB:.1f} GiB free in {disk['path']}"))
    for name, text in rows:
        console.print(f"[bold]{name:<14}[/bold] {_plain(str(text))}")
    if found["speeds"] is not None:
        _show_speeds(found["speeds"], console)
    _show_sockets(found["sockets"], console)
    for problem in found["problems"]:
        text = f"{problem['where']}: {problem['what']}" + (f"; {problem['nearest']}" if problem["nearest"] else "")
        console.print(f"[bold yellow]problem[/bold yellow]  {_plain(text)}")
    if not found["problems"]:
        console.print("[green]nothing wrong[/green]")


def _show_speeds(speeds: Mapping[str, Any], console: Console) -> None:
    best: dict[tuple[str, str, int], float] = {}
    for product in speeds["products"]:
        key = (product["device"], product["precision"], product["threads"])
        best[key] = max(best.get(key, 0.0), product["flops_per_second"])
    console.print("\n[bold]speeds[/bold]")
    for (device, precision, threads), rate in best.items():
        on = f"{device}, {threads} thread{'s' if threads != 1 else ''}" if device == "cpu" else device
        console.print(f"  matrix products  {precision}, {_plain(on)}: {rate / 1e9:,.0f} GFLOP/s")
    for threads, rate in speeds["memory_read_bytes_per_second"].items():
        console.print(f"  memory read      {threads} thread(s): {rate / 1e9:.1f} GB/s")
    for link in speeds["links"]:
        console.print(
            f"  {link['collective']:<16} {link['backend']}, {link['processes']} processes: "
            f"{link['bytes_per_second'] / 1e9:.2f} GB/s, {link['latency_seconds'] * 1e3:.2f} ms"
        )
    console.print(f"  disk write       {speeds['disk_write_bytes_per_second'] / 1e6:,.0f} MB/s")


def _show_sockets(sockets: list[Mapping[str, Any]], console: Console) -> None:
    console.print("\n[bold]sockets that Meshwright opens[/bold]")
    for socket in sockets:
        state = f", {socket['state']}" if socket["state"] else ""
        shows = socket["authenticated"] or "[yellow]unauthenticated[/yellow]"
        console.print(f"  {_plain(socket['what'])} ({_plain(socket['opened_by'])})")
        console.print(
            f"    {_plain(socket['address'])} port {socket['port']}{state}; {shows}; {_plain(socket['note'])}"
        )
    console.print()
