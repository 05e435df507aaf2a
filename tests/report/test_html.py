"""The page of a run: what it shows, that it fetches and runs nothing, and that no text of a run becomes markup."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from meshwright.errors import InputError
from meshwright.layout import Layout
from meshwright.plan import Choice, Interval, Plan, Prediction, RejectedLayout
from meshwright.plan.cost import StageMemory
from meshwright.report import run_record
from meshwright.report.html import write_report
from meshwright.report.run_record import read_run
from meshwright.run import RunFolder

ONE = Layout()
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
JOB = '[task]\nname = "language-model"\n\n[train]\nsteps = 4\nlr = 0.003\n'


def choice(layout: Layout, why: str = "", stages: tuple[tuple[str, ...], ...] = (("embed", "head"),)) -> Choice:
    predicted = Prediction(Interval(1.5, 2.0, 2.5), 3 * 2**30, 2048.0, 0.4, None, None, {"compute": 1.5, "bubble": 0.5})
    memory = StageMemory(2**29, 2**29, 2**30, 2**29, 2**29)
    each = len(stages)
    return Choice(
        layout=layout,
        stages=stages,
        precision="bf16",
        compiled=False,
        micro_batches=4,
        predicted=predicted,
        memory=(memory,) * each,
        forward_seconds=(0.1,) * each,
        backward_seconds=(0.2,) * each,
        transfer_seconds=0.01,
        binding="compute",
        why=why,
    )


def run_folder(path: Path, text: str = "", layout: Layout = ONE, seconds: float = 2.0) -> RunFolder:
    run = RunFolder(path).create()
    stages = (("embed",), ("head" + text,))[: layout.pp]
    other = choice(Layout(tp=2), "slower" + text)
    lost = RejectedLayout(Layout(dp=3), "3 no" + text)
    chosen = choice(layout, "fastest" + text, stages)
    plan = Plan(
        chosen, (other,), (lost,), ("a figure" + text,), "llama" + text, 25_000_000, "2 cores", 2**33, 8, "tokens"
    )
    run.write_plan(plan.as_dict())
    run.write_job(JOB + "# " + text)
    run.append_event("start", step=0, layout=layout.as_dict())
    for step in range(1, 5):
        run.append_event(
            "step", step=step, loss=8.0 / step, step_seconds=seconds, tokens_per_second=1024.0, peak_bytes=2**31
        )
    run.append_event("eval", step=4, held_out_loss=2.25, bits_per_byte=1.5)
    run.append_event("checkpoint", step=4, seconds=0.5, note=text)
    run.append_event("failure", step=4, reason="rank 1 died" + text)
    run.append_event("recovery", step=4, checkpoint="step-4" + text)
    run.append_event("end", step=4, finished=True)
    return run


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on a tag that is closed but was never opened."""

    VOID = ("meta", "link", "rect", "path", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.shown))


def page_of(run: RunFolder) -> Page:
    return Page(write_report(run.path).read_text())


def test_the_headline_has_the_figures_of_the_run(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path / "run"))
    for words in (
        "finished",
        "llama, 25,000,000 parameters",
        "4 of 4 steps",
        "a figure",
        "Final loss 2.000",
        "Held-out bits per byte 1.500",
        "1,024 tokens/s",
        "predicted 2 s, as predicted",
        "Peak memory 2 GiB",
        "predicted 3 GiB, 33 % less",
        "inside the interval",
        "rank 1 died",
        "lr = 0.003",
        "tp2",
        "3 no",
    ):
        assert words in page.text, words


def test_a_step_outside_the_interval_is_said(tmp_path: Path) -> None:
    assert "outside the interval" in page_of(run_folder(tmp_path, seconds=4.0)).text


def test_a_pipeline_has_a_lane_a_stage_and_a_slot_an_action(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path, layout=Layout(pp=2)))
    kinds = [attributes.get("class") for _, attributes in page.tags]
    assert kinds.count("lane") == 2
    assert kinds.count("forward") == kinds.count("backward") == 2 * 4
    assert "lane" not in [attributes.get("class") for _, attributes in page_of(run_folder(tmp_path / "flat")).tags]


def test_text_of_a_run_never_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "<script>x"
    plain, hostile = page_of(run_folder(tmp_path / "plain", layout=Layout(pp=2))), None
    hostile = page_of(run_folder(folder, HOSTILE, layout=Layout(pp=2)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7*7 }}" in hostile.text


def test_the_page_runs_and_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path, HOSTILE))
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "data:,") == "data:,"
    assert "url(" not in (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in (tmp_path / "report.html").read_text()


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    run.append_event("step", step=5, loss=math.nan, step_seconds=2.0)
    run.append_event("step", step=6, loss=1.0, step_seconds=2.0)
    page = page_of(run)
    paths = [attributes["d"] or "" for tag, attributes in page.tags if tag == "path"]
    assert paths[0].count("M") == 2
    assert "nan" not in "".join(paths).lower()


@pytest.mark.parametrize("gone", ["plan.json", "events.jsonl", "job.toml"])
def test_what_is_not_there_yet_is_left_out(tmp_path: Path, gone: str) -> None:
    run = run_folder(tmp_path)
    (tmp_path / gone).unlink()
    page = page_of(run)
    assert ("No step has been recorded yet." in page.text) == (gone == "events.jsonl")


def test_a_run_in_progress_and_a_failed_one_say_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a").create()
    run.append_event("start", step=0)
    assert "not started" in page_of(run).text
    run.append_event("step", step=1, loss=3.0)
    assert "running" in page_of(run).text
    run.append_event("failure", step=1, reason="out of memory")
    assert "failed" in page_of(run).text


def test_accuracy_and_samples_of_a_classifier(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    run.write_job('[task]\nname = "classification"\n')
    run.append_event("step", step=1, loss=2.3, tokens_per_second=900.0)
    run.append_event("eval", step=1, held_out_loss=2.2, accuracy=0.93)
    text = page_of(run).text
    assert "Held-out accuracy 93.0 %" in text
    assert "900.0 samples/s" in text


def test_without_a_metric_the_held_out_loss_is_shown(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    run.append_event("eval", step=1, held_out_loss=2.2)
    assert "Held-out loss 2.200" in page_of(run).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("plan.json", "{"), ("plan.json", "{}"), ("job.toml", "=")])
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    run_folder(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(tmp_path)


def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    line: dict[str, Any] = {"event": "step", "time": 1.0, "loss": 2.0, "step_seconds": 0.1, "tokens_per_second": 9.0}
    with open(run.events, "w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps({**line, "step": step}) + "\n")
    assert write_report(tmp_path).stat().st_size < 150_000


def steps_file(folder: Path, steps: int) -> Path:
    """A run of `steps` steps."""
    run = RunFolder(folder).create()
    line = {"event": "step", "time": 1.0, "loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 9.0, "step_seconds": 0.1}
    text = json.dumps({**line, "peak_bytes": 10**9, "lr": 1e-3, "step": 0})[: -len("0}")]
    with open(run.events, "w") as file:
        file.writelines(f"{text}{step}}}\n" for step in range(1, steps + 1))
    return folder


def test_a_long_run_is_not_held_in_memory(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from meshwright.report.html import write_report\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "write_report(sys.argv[1]); before = peak(); write_report(sys.argv[2]); print(peak() - before)\n"
    )
    folders = [str(steps_file(tmp_path / str(steps), steps)) for steps in (100, 100_000)]
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50e6, "more than 500 bytes a step"


def test_lines_are_parsed_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    parse = json.loads

    def counted(text: Any, **options: Any) -> Any:
        calls.append(text)
        return parse(text, **options)

    steps_file(tmp_path, 5000)
    monkeypatch.setattr(json, "loads", counted)
    write_report(tmp_path)
    assert len(calls) < 50


def test_a_repeated_step_counts_once_and_as_its_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0)):
        run.append_event("step", step=step, loss=loss)
    run.append_event("step", step=4, loss=math.nan)
    run.append_event("step", step=5)
    record = read_run(run)
    assert record.points("loss")[:3] == ((1.0, 9.0), (2.0, 5.0), (3.0, 4.0))
    assert [step for step, _ in record.points("loss")] == [1.0, 2.0, 3.0, 4.0]
    assert record.after_warm_up("loss") == [5.0, 4.0]
    assert record.points("peak_bytes") == ()
    assert record.steps.last_step == 5


def test_the_points_of_a_long_run_are_means_of_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_record, "MOST_EXACT", 4)
    run = RunFolder(tmp_path).create()
    for step, loss in enumerate([9.0, 1.0, 3.0, 5.0, math.nan, math.nan, math.nan, 6.0, 2.0], start=1):
        run.append_event("step", step=step, loss=loss)
    points = read_run(run).points("loss")
    assert [step for step, _ in points] == [1.0, 4.0, 7.0, 8.0, 9.0]
    assert (
        [value for _, value in points[:2]] == [9.0, 3.0]
        and math.isnan(points[2][1])
        and points[3:] == ((8.0, 6.0), (9.0, 2.0))
    )


def test_torch_is_not_loaded() -> None:
    code = "import sys, meshwright.report.html; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_of_a_plan_says_what_failures_and_money_make_of_it() -> None:
    from meshwright.cluster import named_cluster
    from meshwright.families.llama.card import LlamaShape, card
    from meshwright.plan import PlanRequest, make_plan
    from meshwright.report.html import plan_page

    shape = LlamaShape(layers=16, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=8192, vocab=32000)
    planned = make_plan(card(shape, 2048), named_cluster("h100-sxm-80gb", 512), PlanRequest(1024, steps=400_000))
    page = plan_page(planned)
    assert planned.outlook is not None and planned.outlook.dollars is not None
    assert f"${planned.outlook.dollars:,.2f}" in page
    assert f"save every {planned.outlook.checkpoint_steps:,} steps" in page
    assert "<strong>Limit:</strong>" in page
