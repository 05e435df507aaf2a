"""`plan --exact`: which ranks, the JSON, the verdict and the way out of a layout that does not fit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from meshwright import verbs
from meshwright.cli.main import main
from meshwright.errors import CannotWork, InputError
from meshwright.job import Job
from meshwright.plan import Choice
from meshwright.rehearse import CATEGORIES, Peak, RankPeak, Rehearsal, ranks_to_rehearse
from meshwright.verbs import exact

MODEL = {"family": "llama", "layers": 6, "hidden": 64, "heads": 4, "kv_heads": 4, "ffn": 128, "vocab": 256}


def job(batch: int = 64, **layout: Any) -> Job:
    return Job(
        model=MODEL,
        data={"seq_len": 64},
        train={"steps": 2, "lr": 1e-3, "global_batch": batch},
        cluster={"named": "h100-sxm-80gb", "devices": 16},
        layout=layout,
    )


def pretended(sizes: dict[int, int]) -> Any:
    """Stands in for `rehearse`: by the pipeline's stages, the bytes that a rank is said to need."""

    def rehearse(_: Job, choice: Choice, device: Any, ranks: Any = None) -> Rehearsal:
        need = sizes.get(choice.layout.pp, 10**9)
        peak = Peak(need, dict.fromkeys(CATEGORIES, 0), "forward", "loss")
        return Rehearsal(choice.layout, (RankPeak(0, 0, peak, need, need),), 10**10, ())

    return rehearse


def test_ranks_of_every_kind_of_stage_are_taken() -> None:
    chosen = verbs.plan(job(dp=2, tp=2, pp=4)).chosen
    assert ranks_to_rehearse(chosen) == (0, 4, 12)
    worst_third = [dataclasses.replace(one, weights=one.weights * (99 if at == 2 else 1))
                   for at, one in enumerate(chosen.memory)]  # fmt: skip
    assert ranks_to_rehearse(dataclasses.replace(chosen, memory=tuple(worst_third))) == (0, 4, 8, 12)
    assert ranks_to_rehearse(verbs.plan(job(dp=16, tp=1, pp=1)).chosen) == (0,)


def test_the_answer_on_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, child process and all: a layout of 16 GPUs, rehearsed on this machine."""
    from meshwright.job import job_to_toml

    path = tmp_path / "job.toml"
    path.write_text(job_to_toml(job(batch=8, dp=4, tp=2, pp=2, shard=4, micro_batch=1)))
    assert main(["plan", str(path), "--exact", "--ranks", "15", "--json"]) in (0, None)
    exact = json.loads(capsys.readouterr().out)["chosen"]["exact"]
    assert [(one["rank"], one["stage"]) for one in exact["ranks"]] == [(15, 1)]
    assert exact["fits"] and exact["peak_bytes"] == max(one["peak_bytes"] for one in exact["ranks"])
    for one in exact["ranks"]:
        assert sum(one["parts"].values()) == one["peak_bytes"] > 0
        assert set(one["parts"]) == set(CATEGORIES)
        assert one["device_bytes"] > one["peak_bytes"]


def test_ranks_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="ranks 0 to 15"):
        verbs.plan_exact(job(), ranks=[3, 16])


def test_only_our_own_code_is_rehearsed() -> None:
    with pytest.raises(InputError, match="megatron-lm"):
        verbs.plan_exact(job(), framework="megatron-lm")


def test_what_does_not_fit_names_the_runner_up_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import meshwright.rehearse

    planned = verbs.plan(job())
    chosen = planned.chosen.layout.pp
    other = next(choice.layout for choice in planned.runners_up if choice.layout.pp != chosen)
    monkeypatch.setattr(meshwright.rehearse, "rehearse", pretended({chosen: 2 * 10**10}))
    with pytest.raises(CannotWork) as caught:
        exact.plan_exact(job())
    assert caught.value.exit_code == 3
    (problem,) = caught.value.problems
    assert "rank 0 needs 18.6 GiB at its peak (forward of loss), 9.3 GiB more" in problem.what
    assert f"layout.pp={other.pp}" in problem.nearest
    everything = dict.fromkeys(range(1, 17), 2 * 10**10)
    monkeypatch.setattr(meshwright.rehearse, "rehearse", pretended(everything))
    with pytest.raises(CannotWork, match="no runner-up fits either"):
        exact.plan_exact(job())
