"""A rehearsal says what a real run holds: the same tracker follows the same step on fake tensors and on real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshwright.layout import Layout
from meshwright.rehearse import Peak
from meshwright.rehearse.peak import extrapolate
from tests.rehearse.cases import DIGITS, TIED, Case, measure, rehearse_here

SEQUENCE = Layout(tp=2, sequence_parallel=True, micro_batch=4)
QUICK = [
    Case(Layout(micro_batch=4)),
    Case(Layout(micro_batch=4, recompute="selective"), "bf16"),
    Case(Layout(dp=2, shard=2, micro_batch=2), "bf16"),
    Case(SEQUENCE),
    Case(Layout(pp=2, schedule="1f1b", micro_batch=1, recompute="full"), "bf16", TIED, 5),
    Case(Layout(micro_batch=1), model=DIGITS),
]
LAYOUTS = [
    Layout(micro_batch=8),
    Layout(micro_batch=2),
    Layout(dp=2, shard=2, micro_batch=4),
    Layout(tp=2, micro_batch=2),
    SEQUENCE,
    Layout(pp=2, schedule="gpipe", micro_batch=2),
    Layout(pp=2, schedule="1f1b", micro_batch=2),
]
MANY = [
    *(Case(Layout(**{**layout.as_dict(), "recompute": recompute}), precision)
      for layout in LAYOUTS for recompute in ("none", "selective", "full") for precision in ("fp32", "bf16")),
    Case(Layout(pp=2, micro_batch=2), "bf16", TIED),
    Case(Layout(dp=2, shard=2, micro_batch=2), "fp32", TIED),
    Case(Layout(pp=2, tp=2, sequence_parallel=True, micro_batch=1), "bf16"),
    Case(Layout(pp=2, dp=2, shard=2, micro_batch=1), "bf16"),
    Case(Layout(dp=4, shard=2, micro_batch=1), "bf16"),
    Case(Layout(pp=4, micro_batch=1, recompute="full"), "bf16"),
    *(Case(layout, model=DIGITS) for layout in (Layout(micro_batch=8), Layout(dp=2, micro_batch=2))),
]  # fmt: skip


def compare(cases: list[Case], folder: Path, steps: int) -> None:
    measured = measure(cases, folder, steps)
    different = {}
    for case in cases:
        column = case.layout.devices // case.layout.pp
        firsts = range(0, case.layout.devices, column)  # the ranks of a stage hold the same here
        for fake, rank in zip(rehearse_here(case, folder, firsts), firsts, strict=True):
            real = measured[case.name][rank]
            # The thread of a collective may free its tensors late; without collectives the peaks are equal.
            allowed = 0.01 if case.layout.devices > 1 else 0.0
            if abs(fake.total - real.total) > allowed * real.total:
                different[f"{case.name}, rank {rank}"] = (fake, real)
    assert different == {}


def test_rehearsed_is_what_was_measured(tmp_path: Path) -> None:
    compare(QUICK, tmp_path, steps=2)


@pytest.mark.slow
def test_rehearsed_is_what_was_measured_in_every_layout(tmp_path: Path) -> None:
    compare(MANY, tmp_path, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_long_step_from_two_short_ones(schedule: str, tmp_path: Path) -> None:
    """A step of eight micro-batches rehearsed whole holds what is extrapolated from fewer."""
    from meshwright.rehearse.stage import rehearsed_peaks
    from meshwright.rehearse.work import tracked_run

    run = tracked_run(Case(Layout(pp=2, schedule=schedule, micro_batch=1), "bf16", global_batch=8).payload(tmp_path))
    fewer, more = (rehearsed_peaks(run.with_micro_batches(count), 0) for count in (3, 4))
    whole = max(rehearsed_peaks(run, 0).values(), key=lambda peak: peak.total)
    assert extrapolate(fewer, more, 4) == whole


def test_extrapolation_takes_the_worst_of_the_lines() -> None:
    def at(forward: int, backward: int) -> dict[str, Peak]:
        return {
            "F": Peak(forward, {"activations": forward}, "forward", ""),
            "B": Peak(backward, {"gradients": backward}, "backward", ""),
        }

    # The backward is worse at first, the forward grows faster.
    assert extrapolate(at(10, 50), at(20, 51), 0) == at(20, 51)["B"]
    found = extrapolate(at(10, 50), at(20, 51), 10)
    assert (found.total, found.parts, found.phase) == (120, {"activations": 120}, "forward")


def test_the_parts_are_known_quantities(tmp_path: Path) -> None:
    """fp32 on one device: the masters and FSDP2's gathered copy, two moments, and gradients of every parameter."""
    case = Case(Layout(micro_batch=4))
    (peak,) = rehearse_here(case, tmp_path, [0])
    parameters = 4 * (2 * 256 * 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 64)
    assert peak.parts["optimizer"] == 2 * parameters + 4 * 21  # and a count of updates for each parameter
    assert 2 * parameters < peak.parts["weights"] < 2.01 * parameters  # and the rotary frequencies
    assert peak.parts["gradients"] == parameters
    assert sum(peak.parts.values()) == peak.total
    assert not torch.distributed.is_initialized()
