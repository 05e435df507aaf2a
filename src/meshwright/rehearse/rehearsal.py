"""`rehearse`: which ranks to rehearse, in a process of its own, and whether they fit the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright import launch
from meshwright.errors import InputError, Problem
from meshwright.job import Job, job_to_toml
from meshwright.layout import Layout, coordinates
from meshwright.plan import Choice
from meshwright.plan.cost import usable_bytes
from meshwright.rehearse.peak import Peak

if TYPE_CHECKING:
    from meshwright.cluster import Device


@dataclass(frozen=True)
class RankPeak:
    """A rehearsed rank: the `peak` of its tensors, the formula's figure for its stage (`formula_bytes`), and
    `device_bytes`, the peak plus the formula's figures for the allocator and the process."""

    rank: int
    stage: int
    peak: Peak
    formula_bytes: int
    device_bytes: int

    def as_dict(self) -> dict[str, Any]:
        figures = {"formula_bytes": self.formula_bytes, "device_bytes": self.device_bytes}
        return {"rank": self.rank, "stage": self.stage, **self.peak.as_dict(), **figures}


@dataclass(frozen=True)
class Rehearsal:
    """The rehearsed ranks of a layout; `room_bytes` are the usable bytes of a device."""

    layout: Layout
    ranks: tuple[RankPeak, ...]
    room_bytes: int
    assumed: tuple[str, ...]

    @property
    def worst(self) -> RankPeak:
        return max(self.ranks, key=lambda one: one.device_bytes)

    @property
    def fits(self) -> bool:
        return self.worst.device_bytes <= self.room_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "peak_bytes": max(one.peak.total for one in self.ranks),
            "device_bytes": self.worst.device_bytes,
            "room_bytes": self.room_bytes,
            "fits": self.fits,
            "ranks": [one.as_dict() for one in self.ranks],
            "assumed": list(self.assumed),
        }


def ranks_to_rehearse(choice: Choice) -> tuple[int, ...]:
    """The first rank of the first, the second and the last stage, and of the fullest by the formula.

    The first rank of a stage has the largest shards. The stages between first and last differ by the micro-batches in
    flight, of which the second has the most, and by their number of blocks, which the formula takes into account.
    """
    pp = choice.layout.pp
    worst = max(range(pp), key=lambda stage: choice.memory[stage].allocated)
    stages = sorted({0, min(1, pp - 1), pp - 1, worst})
    return tuple(stage * (choice.layout.devices // pp) for stage in stages)


def rehearse(job: Job, choice: Choice, device: Device, ranks: Sequence[int] | None = None) -> Rehearsal:
    """Runs a step of each of `ranks` (default: `ranks_to_rehearse`) on fake tensors. `choice` is a layout planned for
    `job` on devices like `device`.

    Takes seconds to a minute and little memory, for any number of devices. Raises InputError for a rank that the layout
    does not have, CannotWork for a model whose shapes depend on values.
    """
    layout = choice.layout
    chosen = tuple(ranks) if ranks is not None else ranks_to_rehearse(choice)
    wrong = [rank for rank in chosen if rank >= layout.devices]
    if wrong or not chosen:
        named = ", ".join(map(str, wrong)) or "none"
        last = layout.devices - 1
        hint = f"nearest: {last if wrong else 0}"
        raise InputError(Problem("command line: --ranks", f"{named}: the layout has ranks 0 to {last}", hint))
    with launch.scratch_folder("meshwright-rehearse-") as folder:
        path = Path(folder, "job.toml")
        path.write_text(job_to_toml(job), encoding="utf-8")
        payload = {**payload_of(path, choice, device.kind), "ranks": list(chosen)}
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fake tensors need no device
        with launch.local("meshwright.rehearse.work:rehearse", payload, 1, folder, env=environment) as processes:
            answers = processes.wait()[0]
    peaks = tuple(_rank(choice, rank, Peak.from_dict(answer)) for rank, answer in zip(chosen, answers, strict=True))
    return Rehearsal(layout, peaks, usable_bytes(device), _assumed(choice, device.kind))


def payload_of(job: Path, choice: Choice, kind: str) -> dict[str, Any]:
    """The payload of a process that rehearses or measures `choice`."""
    return {
        "job": str(job),
        "layout": asdict(choice.layout),
        "stages": [list(stage) for stage in choice.stages],
        "precision": choice.precision,
        "kind": kind,
    }


def _rank(choice: Choice, rank: int, peak: Peak) -> RankPeak:
    stage = coordinates(choice.layout, rank).pp
    formula = choice.memory[stage]
    return RankPeak(rank, stage, peak, formula.allocated, peak.total + formula.total - formula.allocated)


def _assumed(choice: Choice, kind: str) -> tuple[str, ...]:
    assumed = ["bytes of the allocator, of checkpoints and of the process by the formula"]
    if kind != "cpu":
        assumed.append("flash attention, and no working memory inside other operations")
    if choice.compiled:
        assumed.append("rehearsed without torch.compile, which keeps fewer activations")
    return tuple(assumed)
