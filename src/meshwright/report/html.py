"""`write_report`: a run folder as one page, report.html, with no script and nothing fetched, light and dark."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from meshwright.files import write_atomic
from meshwright.layout import Layout
from meshwright.plan import Choice, Plan
from meshwright.report.charts import (
    Band,
    Chart,
    Series,
    bytes_in_words,
    line_chart,
    plain,
    seconds_in_words,
    smoothed,
    spoken,
)
from meshwright.report.lines import plan_lines
from meshwright.report.run_record import PLAIN_FIELDS, RunRecord, Steps, is_number, read_run
from meshwright.report.timeline import KIND_WORDS, MOST_MICRO_BATCHES
from meshwright.run import RunFolder

TEMPLATE = "page.html.jinja"
HELD_OUT_LOSS = "held_out_loss"  # of an "eval" event, whose other numbers are metrics
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "other")
MOST_EVENTS = 200
MOST_REJECTED = 40


@dataclass(frozen=True)
class Tile:
    """A headline figure. `tone`: "" or "good" or "bad"."""

    name: str
    value: str
    unit: str
    below: str
    tone: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of the memory chart: (kind, per cent of the widest row, text) of each part."""

    name: str
    total: str
    parts: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class PipelinePass:
    """One forward or backward pass in the pipeline's picture. `left` and `width`: per cent of what is shown."""

    kind: str
    left: float
    width: float
    text: str
    label: str


def write_report(run_folder: RunFolder | Path | str) -> Path:
    """Write report.html into a run folder and return its path.

    Reads events.jsonl, plan.json and job.toml; the page leaves out what does not exist yet. Raises InputError for a
    folder that holds none of them, or a plan that cannot be read.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    write_atomic(run.report, _render(read_run(run)).encode())
    return run.report


def plan_page(plan: Plan) -> str:
    """The page of a plan without a run."""
    return _render(RunRecord(plan.model, (), Steps(), (), (), plan, "", {}))


def _render(record: RunRecord) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(**_page(record))


def _page(record: RunRecord) -> dict[str, Any]:
    verdict, tone = _verdict(record)
    chosen = record.plan.chosen if record.plan else None
    return {
        "name": record.name,
        "kind": "plan" if _only_planned(record) else "run",
        "verdict": verdict,
        "tone": tone,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "summary": _summary(record),
        "tiles": _tiles(record),
        "charts": _charts(record),
        "memory": _memory_bars(record),
        "plan": record.plan,
        "plan_lines": plan_lines(record.plan) if record.plan else (),
        "prediction": _prediction_sentence(record),
        "chosen": None if chosen is None else _choice_row(chosen, record.unit),
        "breakdown": [] if chosen is None else _breakdown(chosen),
        "runners_up": [_choice_row(choice, record.unit) for choice in (record.plan.runners_up if record.plan else ())],
        "rejected": [
            (str(lost.layout), lost.reason) for lost in (record.plan.rejected[:MOST_REJECTED] if record.plan else ())
        ],
        "rejected_more": max(0, len(record.plan.rejected) - MOST_REJECTED) if record.plan else 0,
        "pipeline": _pipeline(chosen) if chosen and chosen.layout.pp > 1 else None,
        "events": _event_rows(record),
        "job_text": record.job_text,
    }


def _verdict(record: RunRecord) -> tuple[str, str]:
    """(state of the run in a word or two, tone)."""
    last = next(
        (e["event"] for e in reversed(record.events) if e["event"] in ("start", "end", "failure", "recovery")), ""
    )
    if last == "failure":
        return "failed", "bad"
    if last == "end":
        end = record.last("end") or {}
        return ("finished", "good") if end.get("finished", True) else ("stopped early", "warn")
    if record.steps.last_step is not None:
        return "running", "warn"
    return ("planned", "good") if _only_planned(record) else ("not started", "warn")


def _only_planned(record: RunRecord) -> bool:
    return record.plan is not None and not record.times and not record.job_text


def _summary(record: RunRecord) -> str:
    """One sentence: steps, time and layout."""
    if record.plan and _only_planned(record):
        plan = record.plan
        return f"{plain(plan.parameters)} parameters on {plan.cluster}, layout {plan.chosen.layout}."
    done = record.steps.last_step or 0
    total = record.steps_of_job
    text = f"{done:,} of {total:,} steps" if total else f"{done:,} steps"
    if len(record.times) > 1:
        text += f" in {seconds_in_words(record.times[-1] - record.times[0])}"
    if record.plan:
        text += f" on {record.plan.cluster}, layout {record.plan.chosen.layout}"
        text = f"{record.plan.model}, {plain(record.plan.parameters)} parameters: {text}"
    return text + "."


def _tiles(record: RunRecord) -> list[Tile]:
    tiles = []
    losses = record.points("loss")
    if losses:
        tiles.append(
            Tile("Final loss", plain(losses[-1][1]), "", f"from {spoken(losses[0][1], '')} at step {losses[0][0]:g}")
        )
    if record.evals:
        tiles += _held_out_tiles(record.evals)
    speeds = record.after_warm_up("tokens_per_second")
    if speeds:
        tiles.append(Tile("Throughput", plain(statistics.median(speeds)), f"{record.unit}/s", "median over the run"))
    seconds = record.after_warm_up("step_seconds")
    predicted = record.plan.chosen.predicted if record.plan else None
    if seconds:
        middle = statistics.median(seconds)
        below, tone = "median over the run", ""
        if predicted:
            interval = predicted.step_seconds
            below = f"predicted {seconds_in_words(interval.mid)}, {_deviation(middle, interval.mid)}"
            tone = "good" if interval.low <= middle <= interval.high else "bad"
        value, unit = seconds_in_words(middle).split(" ", 1)
        tiles.append(Tile("Step time", value, unit, below, tone))
    peaks = record.after_warm_up("peak_bytes")
    if peaks:
        below, tone = "of the fullest process", ""
        if predicted:
            below = f"predicted {bytes_in_words(predicted.peak_bytes)}, {_deviation(max(peaks), predicted.peak_bytes)}"
        value, unit = bytes_in_words(max(peaks)).split(" ", 1)
        tiles.append(Tile("Peak memory", value, unit, below, tone))
    return tiles


def _held_out_tiles(evals: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """The last measurement on held-out data: two metrics at most, or the loss where it has no metric."""
    last, first = evals[-1], evals[0]
    names = [name for name in last if name not in PLAIN_FIELDS and is_number(last[name])]
    tiles = []
    for name in [name for name in names if name != HELD_OUT_LOSS][:2] or names:
        below = f"at step {last['step']:g}"
        if first is not last and is_number(first.get(name)):
            below = f"from {_metric(name, first[name])} at step {first['step']:g}"
        label = name.removeprefix("held_out_").replace("_", " ")
        tiles.append(Tile(f"Held-out {label}", _metric(name, last[name]), "", below))
    return tiles


def _metric(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name == "accuracy" else spoken(value, "")


def _charts(record: RunRecord) -> list[Chart]:
    """Loss, throughput, step time and gradient norm, each where the run has its figures."""
    losses = record.points("loss")
    held_out = tuple(
        (float(e["step"]), float(e[HELD_OUT_LOSS])) for e in record.evals if is_number(e.get(HELD_OUT_LOSS))
    )
    loss_series = [Series("each step", losses, "faint"), Series("smoothed", smoothed(losses), "line")]
    if held_out:
        loss_series.append(Series("held out", held_out, "second", dots=True))
    seconds = record.points("step_seconds")
    time_series, bands = [Series("measured", seconds, "line")], []
    if record.plan and seconds:
        interval = record.plan.chosen.predicted.step_seconds
        time_series.append(
            Series("predicted", ((seconds[0][0], interval.mid), (seconds[-1][0], interval.mid)), "guide")
        )
        bands = [Band("90 % interval", interval.low, interval.high)]
    speed = f"{record.unit}/s"
    speeds, norms = record.points("tokens_per_second"), record.points("grad_norm")
    charts = [
        line_chart("Loss", f"nats per {record.unit.removesuffix('s')}, over steps", loss_series) if losses else None,
        line_chart("Throughput", speed, [Series("measured", speeds, "line")], unit=speed, from_zero=True),
        line_chart("Step time", "against the plan", time_series, unit="s", bands=bands, from_zero=True),
        line_chart("Gradient norm", "before clipping", [Series("each step", norms, "line")], from_zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _memory_bars(record: RunRecord) -> list[Bar]:
    """Predicted bytes of each stage by kind, and the measured peak of the fullest process."""
    rows: list[tuple[str, list[tuple[str, float]]]] = []
    if record.plan:
        memory = record.plan.chosen.memory
        for index, stage in enumerate(memory):
            name = "predicted" if len(memory) == 1 else f"predicted, stage {index}"
            rows.append((name, [(part, float(getattr(stage, part))) for part in MEMORY_PARTS]))
    peaks = record.after_warm_up("peak_bytes")
    if peaks:
        rows.append(("measured, fullest process", [("measured", max(peaks))]))
    widest = max((sum(size for _, size in parts) for _, parts in rows), default=0.0)
    if not widest:
        return []
    return [
        Bar(
            name,
            bytes_in_words(sum(size for _, size in parts)),
            tuple(
                (part, round(100 * size / widest, 3), f"{part} {bytes_in_words(size)}") for part, size in parts if size
            ),
        )
        for name, parts in rows
    ]


def _prediction_sentence(record: RunRecord) -> str:
    """Whether the measured step time lies in the predicted interval."""
    seconds = record.after_warm_up("step_seconds")
    if not record.plan or not seconds:
        return ""
    interval, middle = record.plan.chosen.predicted.step_seconds, statistics.median(seconds)
    where = "inside" if interval.low <= middle <= interval.high else "outside"
    low, mid, high, took = map(seconds_in_words, (interval.low, interval.mid, interval.high, middle))
    return f"A step was predicted to take {mid} (90 % interval {low} to {high}) and took {took}: {where} the interval."


def _choice_row(choice: Choice, unit: str) -> dict[str, str]:
    p = choice.predicted
    return {
        "layout": str(choice.layout),
        "precision": choice.precision,
        "step": seconds_in_words(p.step_seconds.mid),
        "interval": f"{seconds_in_words(p.step_seconds.low)} – {seconds_in_words(p.step_seconds.high)}",
        "memory": bytes_in_words(p.peak_bytes),
        "speed": f"{plain(p.tokens_per_second)} {unit}/s",
        "mfu": f"{100 * p.mfu:.0f} %",
        "dollars": "" if p.dollars is None else f"${p.dollars:,.2f}",
        "binding": choice.binding,
        "why": choice.why,
    }


def _breakdown(choice: Choice) -> list[tuple[str, float, str]]:
    """(name, per cent, text) of each part of the predicted step."""
    total = sum(choice.predicted.breakdown.values())
    if total <= 0:
        return []
    return [
        (name, round(100 * seconds / total, 3), f"{name} {seconds_in_words(seconds)} ({100 * seconds / total:.0f} %)")
        for name, seconds in choice.predicted.breakdown.items()
        if seconds > 0
    ]


def _pipeline(choice: Choice) -> dict[str, Any]:
    """The schedule of a step, or of its first micro-batches: a row per rank, a slot per action."""
    timeline = choice.timeline(MOST_MICRO_BATCHES)
    rows: list[list[PipelinePass]] = [[] for _ in range(timeline.ranks)]
    for event in timeline.events:
        left = 100 * event.start_seconds / timeline.seconds
        width = 100 * (event.stop_seconds - event.start_seconds) / timeline.seconds
        kind = KIND_WORDS[event.kind]
        took = seconds_in_words(event.stop_seconds - event.start_seconds)
        text = f"stage {event.stage}, {kind} of micro-batch {event.micro_batch}, {took}"
        label = str(event.micro_batch) if width > 2.2 else ""
        rows[event.rank].append(PipelinePass(kind.split()[0], round(left, 3), round(width, 3), text, label))
    return {
        "rows": list(zip(rows, (_rank_name(choice, rank) for rank in range(timeline.ranks)), strict=True)),
        "seconds": seconds_in_words(timeline.seconds),
        "bubble": f"{100 * timeline.bubble:.0f} %",
        "schedule": choice.layout.schedule,
        "micro_batches": choice.micro_batches,
        "shown": len({event.micro_batch for event in timeline.events}),
        "splits": any(event.kind == "W" for event in timeline.events),
        "virtual": choice.layout.vpp > 1,
    }


def _rank_name(choice: Choice, rank: int) -> str:
    return " + ".join(_stage_name(blocks) for blocks in choice.parts(rank))


def _stage_name(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1]}"


def _event_rows(record: RunRecord) -> list[dict[str, str]]:
    """The last MOST_EVENTS events that are not in the charts."""
    shown = [event for event in record.events if event["event"] not in ("step", "eval")][-MOST_EVENTS:]
    start = record.times[0] if record.times else 0.0
    rows = []
    for event in shown:
        after = event["time"] - start if is_number(event.get("time")) else None
        details = [
            f"{'took' if name == 'seconds' else name.replace('_', ' ')} {_detail(name, event[name])}"
            for name in event
            if name not in PLAIN_FIELDS
        ]
        rows.append(
            {
                "after": "" if after is None else seconds_in_words(after),
                "kind": str(event["event"]),
                "step": f"{event['step']:,}" if isinstance(event.get("step"), int) else "",
                "details": ", ".join(details),
            }
        )
    return rows


def _detail(name: str, value: Any) -> str:
    if name == "layout" and isinstance(value, dict) and value.keys() <= set(Layout.__dataclass_fields__):
        return str(Layout(**value))
    if name == "accuracy" and is_number(value):
        return _metric(name, value)
    if is_number(value):
        unit = "s" if name.endswith("seconds") else "bytes" if name.endswith("bytes") else ""
        return f"{value:,}" if isinstance(value, int) and not unit else spoken(value, unit)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _deviation(measured: float, predicted: float) -> str:
    """ "4 % more" or "12 % less" than predicted."""
    if predicted <= 0:
        return ""
    share = measured / predicted - 1
    return (
        "as predicted"
        if abs(share) < 0.005
        else f"{abs(share):.0%} {'more' if share > 0 else 'less'}".replace("%", " %")
    )
