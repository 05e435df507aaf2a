"""The terminal: a plan on one screen, the progress line of a run, and the result of `doctor`."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, cast

from meshwright.cluster import GIB
from meshwright.plan import Plan
from meshwright.report.lines import cost_line, duration, failure_line, share_lines, what_if_lines
from meshwright.report.timeline import MOST_MICRO_BATCHES, text_rows

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.run import RunFolder

#: (kind of memory, mark and colour of its part of a bar). The marks differ, for terminals without colour.
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
    """One screen of 80 x 40: whether the plan fits, its time and memory, and why the other layouts lost."""
    width = min(console.width, 100)
    _show_verdict(plan, console, width)
    _show_memory(plan, console, width)
    if plan.chosen.layout.pp > 1:
        _show_timeline(plan, console, width)
    _show_others(plan, console, width)
    for line in what_if_lines(plan):
        show_line(console, "what if", escaped(line))
    if plan.assumed:
        show_line(console, "assumed", escaped("; ".join(plan.assumed)), style="dim")


def show_line(console: Console, label: str, markup: str, *, label_width: int = 8, style: str = "") -> None:
    """A label, and beside it a text that is wrapped to 100 columns at most. `style` is the label's."""
    from rich.text import Text

    text = Text.from_markup(markup)
    for line in text.wrap(console, max(20, min(console.width, 100) - label_width)):
        line.rstrip()
        console.print(Text.assemble((f"{label:<{label_width}}", style), line))
        label = ""


def escaped(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", r"\[")


def _show_verdict(plan: Plan, console: Console, width: int) -> None:
    chosen, predicted = plan.chosen, plan.chosen.predicted
    layout, seconds = chosen.layout, predicted.step_seconds
    model = f"{escaped(plan.model)}, {count(plan.parameters)} parameters, on {escaped(plan.cluster)}"
    show_line(console, "FITS", model, style="bold green")
    compiled = ", compiled" if chosen.compiled else ""
    show_line(console, "layout", f"[bold]{layout}[/bold], {chosen.precision}{compiled}; {_batch(plan)}")
    show_line(
        console,
        "step",
        f"[bold]{seconds.mid:.3g} s[/bold] (90 %: {seconds.low:.3g} to {seconds.high:.3g}), "
        f"{predicted.tokens_per_second:,.0f} {plan.unit}/s, MFU {predicted.mfu:.0%}, bound by {chosen.binding}",
    )
    show_line(console, "cost", escaped(cost_line(plan)))
    if failures := failure_line(plan):
        show_line(console, "failure", failures)
    for line in share_lines(plan):
        show_line(console, "share", escaped(line))
    show_line(console, "why", escaped(chosen.why))
    if plan.limit:
        show_line(console, "limit", escaped(plan.limit))
    console.print()


def _batch(plan: Plan) -> str:
    """How the global batch is divided. Groups of devices with shares of their own have a line each."""
    chosen, layout = plan.chosen, plan.chosen.layout
    if plan.has_batch_shares:
        return f"global batch {plan.global_batch}, divided between the shares below"
    count = f"{chosen.micro_batches} micro-batch{'es' * (chosen.micro_batches > 1)}"
    return f"global batch {plan.global_batch} = dp {layout.dp} x {count} of {layout.micro_batch}"


def _show_memory(plan: Plan, console: Console, width: int) -> None:
    """A bar per stage, scaled to the fullest stage."""
    stages = plan.chosen.memory
    most = max(stage.total for stage in stages)
    have = plan.device_bytes
    bar_width = max(20, width - 36)
    key = "  ".join(f"[{colour}]{mark}[/{colour}] {name}" for name, mark, colour in PARTS)
    bounds = plan.chosen.predicted.intervals.get("peak_bytes")
    interval = f" (90 %: {bounds[0] / GIB:.3g} to {bounds[1] / GIB:.3g})" if bounds else ""
    show_line(console, "memory", f"{most / GIB:.3g} of {have / GIB:.1f} GiB on the fullest device{interval}")
    show_line(console, "stage", key)
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
        console.print(f"  {stage:>3} {escaped(blocks):<14.14} {bar} {amount}", no_wrap=True, overflow="crop")
    console.print()


def _cells(parts: list[int], whole: int, width: int) -> list[int]:
    """Characters of each part of a bar in which `whole` is `width` long, rounded so that their sum is right."""
    cells, before, total = [], 0, 0
    for part in parts:
        total += part
        after = round(total / whole * width)
        cells.append(after - before)
        before = after
    return cells


def shown_stages(totals: list[int]) -> list[int | None]:
    """Stages to show: all, or of many the first two, the fullest and the last two, with None for each gap."""
    if len(totals) <= STAGES_SHOWN:
        return list(range(len(totals)))
    fullest = max(range(len(totals)), key=lambda stage: totals[stage])
    keep = sorted({0, 1, fullest, len(totals) - 2, len(totals) - 1})
    shown: list[int | None] = []
    for before, stage in zip([-1, *keep], keep, strict=False):
        shown += [None, stage] if stage > before + 1 else [stage]
    return shown


def _show_timeline(plan: Plan, console: Console, width: int) -> None:
    chosen = plan.chosen
    timeline = chosen.timeline(MOST_MICRO_BATCHES)
    shown = len({event.micro_batch for event in timeline.events})
    idle = chosen.predicted.breakdown["bubble"] / chosen.predicted.step_seconds.mid
    text = f"pipeline, idle for {idle:.0%} of the step: digits are forward, letters backward passes"
    text += ", + weight gradients" if any(event.kind == "W" for event in timeline.events) else ""
    text += "" if chosen.micro_batches == shown else f"; the first {shown} micro-batches"
    console.print(text, width=width)
    rows = text_rows(timeline, width - 6)
    for stage in shown_stages([0] * len(rows)):
        console.print("  ..." if stage is None else f"  {stage:>3} {rows[stage]}", no_wrap=True, overflow="crop")
    console.print()


def _show_others(plan: Plan, console: Console, width: int) -> None:
    runners_up = [
        (
            str(choice.layout),
            f"{choice.predicted.step_seconds.mid:.3g} s",
            f"{choice.predicted.peak_bytes / GIB:.2f} GiB",
            escaped(choice.why),
        )
        for choice in plan.runners_up[:RUNNERS_UP_SHOWN]
    ]
    _show_table(("runners-up", "step", "peak", "why it lost"), runners_up, console, width)
    rejected = [(str(one.layout), escaped(one.reason)) for one in plan.rejected[:REJECTED_SHOWN]]
    _show_table(("rejected", "why"), rejected, console, width)
    if len(plan.rejected) > REJECTED_SHOWN:
        console.print(f"and {len(plan.rejected) - REJECTED_SHOWN} more in `meshwright plan --json`")


def _show_table(names: Sequence[str], rows: Sequence[Sequence[str]], console: Console, width: int) -> None:
    """A table without lines; nothing where it has no rows."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), width=width)
    for name in names:
        table.add_column(name, no_wrap=name in ("step", "peak"))
    for row in rows:
        table.add_row(*row)
    if rows:
        console.print(table)


def count(number: float) -> str:
    """A count in three digits: 2.36 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


@dataclass
class Progress:
    """The figures of the progress line, gathered from a run's event log."""

    steps: int = 0
    step: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def update(self, event: Mapping[str, Any]) -> str | None:
        """Take in an event. Returns a remark to print above the progress line, or None."""
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
        if kind == "upload" and "error" not in event:  # an error is told by a warning
            return f"step {event['step']}: uploaded"
        if kind in ("failure", "recovery"):
            shown = [f"{key} {value}" for key, value in event.items() if key not in ("event", "time")]
            return f"{kind}: " + ", ".join(shown)
        return None

    def line(self, unit: str) -> str:
        """Step, loss, a held-out figure, speed, measured and predicted step time, and the time left."""
        if not self.step:
            return "starting"
        step = self.step["step"]
        seconds = statistics.median(self.recent_seconds)
        words = [f"step {step}/{self.steps or '?'}", f"loss {self.step['loss']:.4f}"]
        if self.held_out:
            words.append(f"held out {_figures(dict(list(self.held_out.items())[:1]))}")
        words.append(f"{self.step['tokens_per_second']:,.0f} {unit}/s")
        predicted = self.step.get("predicted_step_seconds")
        words.append(f"{seconds:.3g} s/step" + (f" (predicted {predicted:.3g})" if predicted else ""))
        if self.steps:
            words.append(f"{duration((self.steps - step) * seconds)} left")
        return "  ".join(words)


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('held_out_', '').replace('_', ' ')} {value:.4g}" for name, value in values.items())


class _Unfailing:
    """A stream that drops what it cannot write."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def live(folder: RunFolder, plan: Plan, until: Callable[[], bool], console: Console | None = None) -> None:
    """Follow a run's events until `until()` is true: in a terminal as one line that is updated in place, elsewhere as
    plain lines at intervals. Writes to stderr by default, and goes on where it cannot be written: the reader of a pipe
    may leave, and a terminal may be closed, while the run goes on."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    if console is None:
        file = None if sys.stderr is None else cast("IO[str]", _Unfailing(sys.stderr))
        console = Console(file=file, highlight=False, quiet=file is None)  # for rich, no file is stdout
    progress = Progress()
    terminal = console.is_terminal
    printed_at = time.monotonic()
    view = Live(console=console, refresh_per_second=4, transient=False) if terminal else nullcontext()
    with view as display:
        for event in folder.tail(until, from_end=True):
            remark = progress.update(event)
            if remark:
                console.print(remark, markup=False)
            if display is not None:
                display.update(Text(progress.line(plan.unit), no_wrap=True, overflow="ellipsis"))
            elif event["event"] == "step" and _line_due(event, progress, printed_at):
                printed_at = time.monotonic()
                console.print(progress.line(plan.unit), markup=False, soft_wrap=True)


def _line_due(event: Mapping[str, Any], progress: Progress, printed_at: float) -> bool:
    """Whether to print a plain line: at the first step, at the last, and every PLAIN_LINE_SECONDS."""
    first = len(progress.recent_seconds) == 1
    return first or event["step"] == progress.steps or time.monotonic() - printed_at >= PLAIN_LINE_SECONDS


def show_doctor(diagnosis: Mapping[str, Any], console: Console) -> None:
    """The result of `probe.diagnose`: the machine, its speeds, every socket, and the problems."""
    cpu, memory = diagnosis["cpu"], diagnosis["memory"]
    packages = ", ".join(f"{name} {version}" for name, version in diagnosis["packages"].items() if version)
    slow = "; slow at bf16: training is faster in fp32" if cpu["slow_bf16"] else ""
    rows = [
        ("meshwright", f"{diagnosis['meshwright']}, Python {diagnosis['python']['version']}, {diagnosis['platform']}"),
        ("packages", packages),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['instructions'])}{slow}"),
        ("memory", f"{memory['total_bytes'] / GIB:.1f} GiB"),
        ("plans for", diagnosis["cluster"]),
    ]
    for place, disk in diagnosis["disk"].items():
        rows.append((f"disk {place}", f"{disk['free_bytes'] / GIB:.1f} GiB free in {disk['path']}"))
    for name, text in rows:
        console.print(f"[bold]{name:<14}[/bold] {escaped(str(text))}")
    if diagnosis["speeds"] is not None:
        _show_speeds(diagnosis["speeds"], console)
    _show_sockets(diagnosis["sockets"], console)
    for problem in diagnosis["problems"]:
        text = f"{problem['where']}: {problem['what']}" + (f"; {problem['nearest']}" if problem["nearest"] else "")
        console.print(f"[bold yellow]problem[/bold yellow]  {escaped(text)}")
    if not diagnosis["problems"]:
        console.print("[green]nothing wrong[/green]")


def _show_speeds(speeds: Mapping[str, Any], console: Console) -> None:
    best: dict[tuple[str, str, int], float] = {}
    for product in speeds["products"]:
        key = (product["device"], product["precision"], product["threads"])
        best[key] = max(best.get(key, 0.0), product["flops_per_second"])
    console.print("\n[bold]speeds[/bold]")
    for (device, precision, threads), rate in best.items():
        on = f"{device}, {threads} thread{'s' if threads != 1 else ''}" if device == "cpu" else device
        console.print(f"  matrix products  {precision}, {escaped(on)}: {rate / 1e9:,.0f} GFLOP/s")
    for threads, rate in speeds["memory_read_bytes_per_second"].items():
        console.print(f"  memory read      {threads} thread(s): {rate / 1e9:.1f} GB/s")
    for link in speeds["links"]:
        console.print(
            f"  {link['collective']:<16} {link['backend']}, {link['processes']} processes: "
            f"{link['bytes_per_second'] / 1e9:.2f} GB/s, {link['latency_seconds'] * 1e3:.2f} ms"
        )
    console.print(f"  disk write       {speeds['disk_write_bytes_per_second'] / 1e6:,.0f} MB/s")


def _show_sockets(sockets: Sequence[Mapping[str, Any]], console: Console) -> None:
    console.print("\n[bold]sockets that Meshwright opens[/bold]")
    for socket in sockets:
        state = f", {socket['state']}" if socket["state"] else ""
        credentials = socket["authenticated"] or "[yellow]unauthenticated[/yellow]"
        console.print(f"  {escaped(socket['what'])} ({escaped(socket['opened_by'])})")
        console.print(
            f"    {escaped(socket['address'])} port {socket['port']}{state}; {credentials}; {escaped(socket['note'])}"
        )
    console.print()
