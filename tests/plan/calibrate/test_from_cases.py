"""Runs computed with known constants: calibrate predicts others like them, its intervals hold, and it reports."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.cli.main import main
from meshwright.errors import InputError
from meshwright.plan.calibrate import calibrate
from meshwright.plan.calibrate.fit import spread_rows
from meshwright.plan.calibrate.from_cases import (
    Calibration,
    Row,
    conformal,
    pair_intervals,
    resolve_rows,
    weighted_quantile,
)
from meshwright.plan.cases import MeasuredCase, Predictor
from meshwright.plan.cases.read import parse_measured_case
from meshwright.plan.constants import DATASHEET, load_profile
from meshwright.plan.rules import FRAMEWORKS

#: The made-up machine: a GPU whose products, memory and starts are slower than the data sheets' constants say.
FACTORS = {"product": 0.8, "memory": 0.8, "launch": 1.5}


def lines() -> list[dict[str, Any]]:
    """Layouts of two models on 8 devices."""
    found = []
    for hidden in (1024, 2048):
        for dp, tp, pp in ((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4), (4, 1, 2), (1, 4, 2)):
            for micro in (1, 2, 4):
                for batch in (32, 64):
                    model = {
                        "layers": 8, "hidden": hidden, "heads": 16, "ffn": 4 * hidden, "vocab": 32000,
                        "seq_len": 1024, "gated": False,
                    }  # fmt: skip
                    line = {
                        "id": str(len(found)),
                        "group": f"{hidden}-{batch}",
                        "source": "made up",
                        "model": model,
                        "cluster": {"device": "a100-sxm-80gb", "devices": 8, "devices_per_node": 8},
                        "train": {"global_batch": batch, "precision": "bf16"},
                        "layout": {"dp": dp, "tp": tp, "pp": pp, "micro_batch": micro, "recompute": "full"},
                        "software": {"framework": "megatron-lm"},
                    }
                    found.append(line)
    return found


def truth() -> dict[str, float]:
    """The machine's constants."""
    values = {}
    for name, value in DATASHEET.constants.items():
        for word, factor in FACTORS.items():
            if word in name and not name.startswith("cpu"):
                values[name] = value * factor
    return values


def made_up(bump: float = 1.0) -> list[MeasuredCase]:
    """Runs as the machine would take them, with 1 % of noise; `bump` slows layouts with tp = 8 beyond any constant."""
    noise = random.Random(0)
    machine = Predictor(DATASHEET.changed(truth()))
    cases = []
    for line in lines():
        seconds = machine.predict(parse_measured_case({**line, "measured": {"step_seconds": 1}}).case)["step_seconds"][
            "mid"
        ]  # type: ignore[union-attr]
        seconds *= noise.gauss(1, 0.01) * (bump if line["layout"]["tp"] == 8 else 1.0)
        case = parse_measured_case({**line, "measured": {"step_seconds": seconds}})
        assert isinstance(case, MeasuredCase)
        cases.append(case)
    return cases


def errors(found: Calibration, cases: list[MeasuredCase]) -> tuple[float, float]:
    """Mean error of the cases, and the share in their intervals."""
    predictor = Predictor(found.profile)
    answers = [(predictor.predict(one.case)["step_seconds"], one.step_seconds) for one in cases]
    inside = sum(answer["low"] <= seconds <= answer["high"] for answer, seconds in answers)
    return sum(abs(answer["mid"] / seconds - 1) for answer, seconds in answers) / len(answers), inside / len(answers)


@pytest.fixture(scope="module")
def bumped() -> tuple[list[MeasuredCase], list[MeasuredCase], Calibration]:
    cases = made_up(bump=1.25)
    picked = set(spread_rows([one.group for one in cases], 36))
    fitted = [one for index, one in enumerate(cases) if index in picked]
    rest = [one for index, one in enumerate(cases) if index not in picked]
    return fitted, rest, calibrate(fitted, DATASHEET)


def test_runs_never_seen_are_predicted_and_intervals_hold(
    bumped: tuple[list[MeasuredCase], list[MeasuredCase], Calibration],
) -> None:
    _, rest, found = bumped
    error, coverage = errors(found, rest)
    assert found.before > 0.1
    assert error < 0.03
    assert coverage > 0.7  # of 48 runs: a sample of what is 0.9 on average


def test_what_no_constant_describes_becomes_a_correction(
    bumped: tuple[list[MeasuredCase], list[MeasuredCase], Calibration],
) -> None:
    _, rest, found = bumped
    assert found.held_out < 0.9 * found.held_out_plain
    assert set(found.profile.corrections) == {"a100-sxm-80gb/megatron-lm/bf16/full/node"}
    plain = replace(found, profile=replace(found.profile, corrections={}))
    assert errors(found, rest)[0] < errors(plain, rest)[0]


def test_the_report_lists_the_moves(bumped: tuple[list[MeasuredCase], list[MeasuredCase], Calibration]) -> None:
    account = bumped[2].as_dict()
    assert account["rows"] == 36
    assert account["moved"]
    assert all(row["from"] != row["to"] for row in account["moved"])
    assert json.loads(json.dumps(account)) == account


def test_the_same_runs_give_the_same_profile_and_the_file_keeps_it(
    bumped: tuple[list[MeasuredCase], list[MeasuredCase], Calibration], tmp_path: Path
) -> None:
    fitted, rest, found = bumped
    few = fitted[::3]
    assert calibrate(few, DATASHEET).profile == calibrate(few, DATASHEET).profile
    found.profile.save(tmp_path / "p.toml")
    again = load_profile(tmp_path / "p.toml")
    for one in rest[:10]:
        before, after = (Predictor(profile).predict(one.case) for profile in (found.profile, again))
        assert after["step_seconds"]["mid"] == pytest.approx(before["step_seconds"]["mid"], rel=1e-3)


def test_too_few_runs_are_bad_input() -> None:
    with pytest.raises(InputError, match="give three or more"):
        calibrate(made_up()[:2], DATASHEET)


REGIME = "cuda.megatron-lm.node"


def grouped_rows(groups: int) -> list[Row]:
    """Rows of layouts and models that differ, in `groups` groups of equal size."""
    rows, _ = resolve_rows(made_up())
    return [replace(row, group=str(index % groups)) for index, row in enumerate(rows)]


@pytest.mark.parametrize("groups", [9, 12, 28])
def test_an_interval_holds_for_a_group_that_was_not_seen(groups: int) -> None:
    """Errors that the runs of a group share (8 %) beside their own (2 %), drawn again and again; the next group's runs
    lie in the interval nine times of ten, and little more often."""
    rows, draw = grouped_rows(groups), random.Random(3)
    start = replace(DATASHEET, intervals={**DATASHEET.intervals, "all": (0.99, 1.01)})
    inside = []
    for _ in range(200):
        common = [draw.gauss(0, 0.08) for _ in range(groups + 1)]
        logs = [common[int(row.group)] + draw.gauss(0, 0.02) for row in rows]
        low, high = conformal(rows, logs, [1.0] * len(rows), start)[REGIME]
        inside.append(low <= math.exp(common[-1] + draw.gauss(0, 0.02)) <= high)
    assert 0.87 < sum(inside) / len(inside) < 0.97


def test_few_groups_leave_the_start_s_interval_or_widen_it() -> None:
    rows = grouped_rows(8)
    narrow = [0.001] * len(rows)
    assert conformal(rows, narrow, [1.0] * len(rows), DATASHEET)[REGIME] == pytest.approx((1 / 1.4, 1.4))
    logs = [0.5 if row.group == "3" else 0.001 for row in rows]
    assert conformal(rows, logs, [1.0] * len(rows), DATASHEET)[REGIME][1] == pytest.approx(math.exp(0.5))
    more = grouped_rows(9)
    assert conformal(more, narrow, [1.0] * len(rows), DATASHEET)[REGIME][1] == pytest.approx(math.exp(0.001))


def test_runs_of_one_group_do_not_narrow_the_interval_of_others() -> None:
    """Although the correction knows runs nearby. Runs without a group are grouped by what layouts have in common."""
    cases = made_up(bump=1.25)
    plain = [parse_measured_case({**line, "group": "", "measured": {"step_seconds": 1}}) for line in lines()]
    groups = [one.group for one in plain if isinstance(one, MeasuredCase)]
    assert len(set(groups)) == 4
    assert len(set(zip(groups, (one.group for one in cases), strict=True))) == 4
    seen = [replace(one, group=name) for one, name in zip(cases, groups, strict=True) if name == groups[0]]
    profile = calibrate(seen, DATASHEET).profile
    assert profile.corrections
    for one in cases[::5]:
        seconds = Predictor(profile).predict(one.case)["step_seconds"]
        assert seconds["high"] / seconds["low"] >= 1.4 / 0.75


def test_sources_weigh_the_same() -> None:
    """Runs of one source that are off by a percent, and a fifth as many of another that are off by half."""
    rows = grouped_rows(28)
    many = [row for row in rows for _ in range(5)]
    other = [replace(row, source="other", group=f"other {row.group}") for row in rows]
    draw = random.Random(1)
    logs = [draw.gauss(0, 0.01) for _ in many] + [draw.gauss(0, 0.5) for _ in other]
    assert conformal([*many, *other], logs, [1.0] * len(logs), DATASHEET)[REGIME][1] > 1.4
    alone = conformal(many, logs[: len(many)], [1.0] * len(many), DATASHEET)[REGIME]
    assert 0.97 < alone[0] < 1 < alone[1] < 1.03


def test_a_wider_regime_needs_several_narrower_ones() -> None:
    """One regime has no interval that wider ones would share; a regime of few groups has the next wider one's."""
    rows = grouped_rows(28)
    logs = [0.001] * len(rows)
    assert set(conformal(rows, logs, [1.0] * len(rows), DATASHEET)) == {REGIME}
    titan = FRAMEWORKS["torchtitan"]
    others = [
        replace(row, group="one", run=replace(row.run, workload=replace(row.run.workload, framework=titan)))
        for row in rows
    ]
    found = conformal([*rows, *others], [*logs, *logs], [1.0] * 2 * len(rows), DATASHEET)
    assert set(found) == {"cuda", REGIME, "cuda.torchtitan.node"}
    assert found["cuda.torchtitan.node"] == found["cuda"]


def test_what_layouts_of_a_group_have_in_common_does_not_blur_which_is_quicker() -> None:
    """Every group is off by a factor of its own, up to two; its layouts by 2 % beside it."""
    rows = grouped_rows(12)
    draw = random.Random(2)
    common = {group: draw.uniform(-0.7, 0.7) for group in sorted({row.group for row in rows})}
    logs = [common[row.group] + draw.gauss(0, 0.02) for row in rows]
    low, high = pair_intervals(rows, logs)["pairs.cuda"]
    assert low == pytest.approx(1 / high)
    assert high == pytest.approx(math.exp(1.645 * 0.02 * math.sqrt(2)), rel=0.01)
    assert conformal(rows, logs, [1.0] * len(logs), DATASHEET)[REGIME][1] > 1.5
    assert pair_intervals(rows[:3], logs[:3]) == {}


def test_quantiles_of_weighted_values() -> None:
    assert weighted_quantile([(3.0, 1), (1.0, 1), (2.0, 2)], 0.5) == 2.0
    assert weighted_quantile([(3.0, 1), (1.0, 1), (2.0, 2)], 1.0) == 3.0
    assert weighted_quantile([(3.0, 1), (1.0, 9)], 0.9) == 1.0


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """calibrate writes a profile and its account; predict uses it; lines that cannot serve are named."""
    measured = tmp_path / "measured.jsonl"
    rows = [
        {**line, "measured": {"step_seconds": one.step_seconds}}
        for line, one in zip(lines(), made_up(), strict=True)
        if int(line["id"]) % 5 == 0
    ]
    measured.write_text("\n".join([*(json.dumps(row) for row in rows), '{"id": "bad"}']))
    out = tmp_path / "ours.toml"
    assert main(["calibrate", str(measured), "--out", str(out), "--datasheet", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["rows"] == len(rows)
    assert [one["id"] for one in account["skipped"]] == ["bad"]
    assert main(["predict", str(measured), "--profile", str(out)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["id"] for answer in answers] == [*(row["id"] for row in rows), "bad"]
    assert "error" in answers[-1]
    assert main(["calibrate", str(measured), "--out", str(tmp_path / "no" / "p.toml")]) == 2
    assert main(["predict", str(measured), "--profile", str(tmp_path / "none.toml")]) == 2


def measured_file(folder: Path, factors: dict[int, float] | None = None, every: int = 8) -> Path:
    """A file of measured cases; `factors` says by how much the seconds of some lines are off."""
    path = folder / "measured.jsonl"
    picked = list(zip(lines(), made_up(), strict=True))[::every]
    rows = [
        {**line, "measured": {"step_seconds": one.step_seconds * (factors or {}).get(index, 1.0)}}
        for index, (line, one) in enumerate(picked)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured or fitted."""

    def fails(*_: object, **__: object) -> None:
        pytest.fail("measured or fitted")

    monkeypatch.setattr("meshwright.probe.machine", fails)
    monkeypatch.setattr("meshwright.plan.calibrate.from_cases.calibrate", fails)
    monkeypatch.setattr("meshwright.plan.calibrate.from_run.run_profile", fails)


@pytest.mark.usefixtures("idle")
def test_only_a_profile_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the source, not what lies in the run folder, not a file that is not a profile; nor through a link."""
    cases, run, other = measured_file(tmp_path), tmp_path / "run", tmp_path / "other.toml"
    run.mkdir()
    for name in ("job.toml", "plan.json", "events.jsonl"):
        (run / name).write_text("x = 1\n")
    other.write_text('[model]\nfamily = "llama"\n')
    (tmp_path / "empty.toml").touch()
    for name, target in (("to_cases", cases), ("to_other", other), ("to_job", run / "job.toml"), ("to_run", run)):
        (tmp_path / name).symlink_to(target)
    before = {path: path.read_bytes() for path in (*run.iterdir(), cases, other)}
    for source, out, says in (
        (cases, cases, "is what the profile is made from; name another file"),
        (cases, tmp_path / "to_cases", "is what the profile is made from"),
        (tmp_path / "to_cases", cases, "is what the profile is made from"),
        (cases, other, "exists and is not a profile (unknown key 'model'); name another file, or move it away"),
        (cases, tmp_path / "to_other", "exists and is not a profile"),
        (cases, tmp_path / "empty.toml", "exists and is not a profile (has no [constants]"),
        (cases, run, "exists and is not a regular file"),
        ("machine", other, "exists and is not a profile"),
        ("machine", cases, "exists and is not a profile (not TOML"),
        (run, run / "job.toml", f"lies in the run folder {run}; name another file, outside it"),
        (run, run / "new.toml", "lies in the run folder"),
        (run, tmp_path / "to_job", "lies in the run folder"),
        (run, tmp_path / "to_run" / "new.toml", "lies in the run folder"),
        (tmp_path / "to_run", run / "new.toml", "lies in the run folder"),
        (run, run, "is what the profile is made from"),
        (run, cases, "exists and is not a profile"),
    ):
        assert main(["calibrate", str(source), "--out", str(out)]) == 2
        assert f"error: {out}: {says}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "new.toml").exists()


def test_a_profile_is_replaced_where_a_link_leads(tmp_path: Path) -> None:
    cases, old, link = measured_file(tmp_path, every=28), tmp_path / "old.toml", tmp_path / "link.toml"
    old.write_text("[constants]\n")
    link.symlink_to(old)
    assert main(["calibrate", str(cases), "--profile", str(old), "--out", str(link)]) == 0
    assert link.is_symlink() and load_profile(old).fitted_rows == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "measured.jsonl", "old.toml"]


@pytest.mark.parametrize(
    ("factor", "unit"), [(1e3, "milliseconds"), (1e6, "microseconds"), (1e-300, "the seconds of a whole step\n")]
)
@pytest.mark.usefixtures("idle")
def test_runs_in_another_unit_are_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, unit: str
) -> None:
    cases = measured_file(tmp_path, dict.fromkeys(range(1, 11), factor))
    assert main(["calibrate", str(cases), "--out", str(tmp_path / "p.toml"), "--datasheet"]) == 2
    message = capsys.readouterr().err
    assert f"{cases}: 10 of 11 runs took more than 100 times longer or shorter than predicted" in message
    assert unit in message and len(message) < 400
    assert not (tmp_path / "p.toml").exists()


def test_a_few_runs_in_another_unit_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = measured_file(tmp_path, {0: 1e-300, 3: 1e3}, every=12)
    assert main(["calibrate", str(cases), "--out", str(tmp_path / "p.toml"), "--datasheet", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["rows"] == 5 and account["mean_error"]["before"] < 1
    assert [one["id"] for one in account["skipped"]] == ["0", "36"]
    assert "these look like milliseconds" in account["skipped"][1]["error"]
    assert load_profile(tmp_path / "p.toml").fitted_rows == 5


def test_a_file_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "none.jsonl"
    cases.write_text('{"id": "bad"}\n')
    assert main(["calibrate", str(cases), "--out", str(tmp_path / "p.toml")]) == 2
    assert f"{cases}: 0 measured runs that can be used; the first that cannot" in capsys.readouterr().err


@pytest.mark.usefixtures("idle")
def test_seconds_are_for_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = measured_file(tmp_path)
    assert main(["calibrate", str(cases), "--out", str(tmp_path / "p.toml"), "--seconds", "5"]) == 2
    assert "leave out --seconds" in capsys.readouterr().err
