"""The fast formula that the search uses stays near what a rehearsal of the same rank finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright import verbs
from meshwright.job import Job, job_to_toml
from meshwright.layout import Layout
from meshwright.rehearse.rehearsal import payload_of

#: Largest relative distance of the formula from the rehearsal that the cases below may show.
BAND = 0.065
MODEL = {"family": "llama", "layers": 4, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 2048, "vocab": 8192}
QUICK = [Layout(dp=4, shard=4, pp=2, schedule="1f1b", micro_batch=1)]
MANY = [
    Layout(dp=4, shard=4, tp=2, sequence_parallel=True, micro_batch=1, recompute="selective"),
    Layout(dp=8, micro_batch=1),
    Layout(dp=8, shard=8, micro_batch=1, recompute="full"),
    Layout(dp=8, shard=4, micro_batch=2, recompute="selective"),
    Layout(dp=4, tp=2, micro_batch=1),
    Layout(dp=2, tp=4, sequence_parallel=True, micro_batch=2),
    Layout(dp=4, pp=2, schedule="gpipe", micro_batch=1, recompute="full"),
    Layout(dp=2, shard=2, pp=4, schedule="1f1b", micro_batch=1),
    Layout(dp=4, shard=4, pp=2, schedule="gpipe", micro_batch=1),
    Layout(dp=4, shard=4, pp=2, schedule="1f1b", micro_batch=4),  # as many micro-batches as stages
]


def distances(layout: Layout, precision: str, folder: Path) -> dict[int, float]:
    """Formula over rehearsal, less one, of the first rank of each stage."""
    from meshwright.rehearse.work import rehearsed_peak, tracked_run

    job = Job(
        model=MODEL,
        data={"seq_len": 512},
        train={"steps": 2, "lr": 1e-3, "global_batch": 32, "precision": precision},
        cluster={"named": "h100-sxm-80gb", "devices": layout.devices},
        layout=layout.as_dict(),
    )
    chosen = verbs.plan(job).chosen
    path = folder / "job.toml"
    path.write_text(job_to_toml(job))
    run = tracked_run(payload_of(path, chosen, "cuda"))
    column = layout.devices // layout.pp
    found = {stage: rehearsed_peak(run, stage * column).total for stage in range(layout.pp)}
    return {stage: chosen.memory[stage].allocated / total - 1 for stage, total in found.items()}


@pytest.mark.parametrize("layout", QUICK, ids=str)
def test_the_formula_is_near(layout: Layout, tmp_path: Path) -> None:
    far = {stage: apart for stage, apart in distances(layout, "bf16", tmp_path).items() if abs(apart) > BAND}
    assert far == {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", MANY, ids=str)
def test_the_formula_is_near_in_every_layout(layout: Layout, precision: str, tmp_path: Path) -> None:
    far = {stage: apart for stage, apart in distances(layout, precision, tmp_path).items() if abs(apart) > BAND}
    assert far == {}
