"""Small jobs in many layouts, each to be rehearsed and to be run for real under the same tracker."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright import launch
from meshwright.job import Job, job_to_toml
from meshwright.launch import Context
from meshwright.layout import Layout
from meshwright.rehearse import Peak

LLAMA = {"family": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 256}
TIED = {**LLAMA, "tied_embeddings": True, "qk_norm": True}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIGITS = {"module": "digits:build", "module_folder": str(EXAMPLES), "arguments": {"width": 16, "depth": 2}}
SEQ_LEN = 64
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Case:
    """A model in a layout, with the precision of its arithmetic."""

    layout: Layout
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=lambda: LLAMA)
    global_batch: int = GLOBAL_BATCH

    @property
    def name(self) -> str:
        kind = "digits" if "module" in self.model else "tied" if self.model is TIED else "llama"
        return f"{kind} {self.precision} {self.layout} batch{self.global_batch}"

    @property
    def job(self) -> Job:
        data: dict[str, Any] = {"source": "digits"} if "module" in self.model else {"seq_len": SEQ_LEN}
        train = {"steps": 2, "lr": 1e-3, "global_batch": self.global_batch, "precision": self.precision}
        return Job(model=self.model, data=data, train=train)

    @property
    def blocks(self) -> list[str]:
        if "module" in self.model:
            return ["stem", "1", "2", "head"]
        return ["embed", *map(str, range(self.model["layers"])), "head"]

    def payload(self, folder: Path) -> dict[str, Any]:
        """The payload of a process, whose job is written into `folder`."""
        path = folder / f"{self.name.replace(' ', '-')}.toml"
        path.write_text(job_to_toml(self.job))
        cuts = [index * len(self.blocks) // self.layout.pp for index in range(self.layout.pp + 1)]
        stages = [self.blocks[a:b] for a, b in itertools.pairwise(cuts)]
        options = {"stages": stages, "precision": self.precision, "kind": "cpu"}
        return {"job": str(path), "layout": self.layout.as_dict(), **options}


def rehearse_here(case: Case, folder: Path, ranks: Iterable[int]) -> list[Peak]:
    """Some ranks, in this process."""
    from meshwright.rehearse.work import rehearsed_peak, tracked_run

    run = tracked_run(case.payload(folder))
    return [rehearsed_peak(run, rank) for rank in ranks]


def measure_here(case: Case, folder: Path) -> list[Peak]:
    """A case of one rank, run for real in this process."""
    from meshwright.rehearse.work import measured_peaks, tracked_run

    peaks = measured_peaks(tracked_run(case.payload(folder)), Context.alone(), steps=2)
    return [min(peaks, key=lambda peak: peak.total)]


def measure(cases: Sequence[Case], folder: Path, steps: int, seconds: float = 500) -> dict[str, list[Peak]]:
    """Runs the cases for real, those of one number of ranks in the same processes; peaks of the ranks, by name."""
    found: dict[str, list[Peak]] = {}
    for size in sorted({case.layout.devices for case in cases}):
        group = [case for case in cases if case.layout.devices == size]
        if size == 1:
            found |= {case.name: measure_here(case, folder) for case in group}
            continue
        payload = {"cases": [case.payload(folder) for case in group], "steps": steps}
        env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with launch.local("meshwright.rehearse.work:measure", payload, size, folder / f"logs-{size}", env=env) as work:
            ranks = work.wait(seconds)
        for index, case in enumerate(group):
            found[case.name] = [Peak.from_dict(answers[index]) for answers in ranks]
    return found
