"""Peak memory of a rank's tensors: the fast formula and the rehearsal beside real runs.

    python -m bench.runs.memory                  every case, its fullest rank, on this machine's CPU
    python -m bench.runs.memory --only tp pp     cases whose name has one of these words
    python -m bench.runs.memory --large          layouts of Llama 3 8B on 8 to 1,024 GPUs: formula and rehearsal alone

Columns: the formula (plan/cost/memory.py), the rehearsal (fake tensors, one process), and the live tensors of a real
run under the same tracker. For layouts of one process also the allocator's own figure, from a real run without a
tracker: by torch's profiler on a CPU, torch.cuda.max_memory_allocated on a GPU (`--gpu`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright import launch, verbs
from meshwright.job import Job, job_to_toml
from meshwright.launch import Context
from meshwright.layout import Layout, coordinates
from meshwright.rehearse import Peak, rehearse
from meshwright.rehearse.rehearsal import payload_of

LLAMA = {"family": "llama", "layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 2048}
TIED = {**LLAMA, "tied_embeddings": True}
EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
DIGITS = {"module": "digits:build", "module_folder": EXAMPLES, "arguments": {"width": 32, "depth": 4}}
LLAMA_8B = {
    "family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256,
}  # fmt: skip
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class MemoryCase:
    """A job of `model` whose layout is pinned, on `named` devices (None: CPU processes)."""

    model: Mapping[str, Any]
    layout: Layout
    precision: str
    batch: int = 8
    seq_len: int = 256
    named: str | None = None

    @property
    def name(self) -> str:
        kind = "digits" if "module" in self.model else "tied" if self.model is TIED else "llama"
        return f"{kind} {self.precision} {self.layout}"

    @property
    def job(self) -> Job:
        task: dict[str, Any] = {"source": "digits"} if "module" in self.model else {"seq_len": self.seq_len}
        train = {"steps": 2, "lr": 1e-3, "global_batch": self.batch, "precision": self.precision, "compile": False}
        cluster = {"devices": self.layout.devices, **({"named": self.named} if self.named else {})}
        return Job(model=dict(self.model), data=task, train=train, cluster=cluster, layout=self.layout.as_dict())


def small_cases() -> Iterator[MemoryCase]:
    for precision in ("fp32", "bf16"):
        for recompute in RECOMPUTE:
            for base in (
                Layout(micro_batch=8),
                Layout(micro_batch=2),
                Layout(dp=2, micro_batch=2),
                Layout(dp=2, shard=2, micro_batch=4),
                Layout(dp=2, shard=2, micro_batch=1),
                Layout(tp=2, micro_batch=4),
                Layout(tp=2, sequence_parallel=True, micro_batch=4),
                Layout(pp=2, schedule="gpipe", micro_batch=2),
                Layout(pp=2, schedule="1f1b", micro_batch=1),
            ):
                yield MemoryCase(LLAMA, dataclasses.replace(base, recompute=recompute), precision)
        yield MemoryCase(TIED, Layout(dp=2, shard=2, micro_batch=2), precision)
        yield MemoryCase(TIED, Layout(pp=2, micro_batch=2), precision)
    for layout in (Layout(micro_batch=32), Layout(dp=2, shard=2, micro_batch=16), Layout(pp=2, micro_batch=8)):
        yield MemoryCase(DIGITS, layout, "fp32", batch=64)


def gpu_cases() -> Iterator[MemoryCase]:
    for layers, hidden, micro in ((8, 1024, 4), (12, 1536, 2), (16, 2048, 1)):
        for precision in ("fp32", "bf16"):
            for recompute in RECOMPUTE:
                shape = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "kv_heads": hidden // 128}
                model = {"family": "llama", **shape, "ffn": 4 * hidden, "vocab": 32000}
                yield MemoryCase(model, Layout(micro_batch=micro, recompute=recompute), precision, seq_len=1024)


def large_cases() -> Iterator[MemoryCase]:
    for layout, batch in (
        (Layout(dp=8, shard=8, micro_batch=1, recompute="full"), 64),
        (Layout(dp=64, shard=64, micro_batch=1, recompute="selective"), 128),
        (Layout(dp=4, shard=4, tp=2, sequence_parallel=True, micro_batch=1, recompute="full"), 64),
        (Layout(dp=8, shard=8, tp=8, sequence_parallel=True, micro_batch=1), 64),
        (Layout(dp=4, shard=4, tp=4, pp=4, sequence_parallel=True, micro_batch=1, recompute="selective"), 64),
        (Layout(dp=32, shard=32, tp=8, pp=4, sequence_parallel=True, micro_batch=1), 1024),
        (Layout(dp=32, shard=32, tp=8, pp=4, sequence_parallel=True, micro_batch=1, schedule="gpipe"), 256),
    ):
        yield MemoryCase(LLAMA_8B, layout, "bf16", batch=batch, seq_len=4096, named="h100-sxm-80gb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name has one of these")
    parser.add_argument("--large", action="store_true", help="Llama 3 8B, formula against rehearsal")
    parser.add_argument("--gpu", action="store_true", help="single-device cases on this machine's GPU")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = list(large_cases() if options.large else gpu_cases() if options.gpu else small_cases())
    if options.only:
        cases = [case for case in cases if any(word in case.name for word in options.only)]
    rows = []
    for size in sorted({case.layout.devices for case in cases}):
        group = [case for case in cases if case.layout.devices == size]
        for row in _large_rows(group) if options.large else _rows(group):
            rows.append(row)
            print(json.dumps(row) if options.json else _text(row), flush=True)
    if not options.json:
        _summary(rows)


def _large_rows(cases: Sequence[MemoryCase]) -> Iterator[dict[str, Any]]:
    for case in cases:
        choice = verbs.plan(case.job).chosen
        begin = _children_seconds()
        rehearsal = rehearse(case.job, choice, verbs.cluster_of_job(case.job).device)
        peaks, formulas = [one.peak for one in rehearsal.ranks], [one.formula_bytes for one in rehearsal.ranks]
        yield {**_row(case, peaks, formulas), "seconds": _children_seconds() - begin}


def _children_seconds() -> float:
    """Processor time of the processes started so far, which does not depend on the load of the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _rows(cases: Sequence[MemoryCase]) -> Iterator[dict[str, Any]]:
    """Rows of cases with the same number of devices. All cases are run in one set of processes, then rehearsed."""
    choices = [verbs.plan(case.job).chosen for case in cases]
    kind = verbs.cluster_of_job(cases[0].job).device.kind
    ranks = cases[0].layout.devices
    with tempfile.TemporaryDirectory() as folder:
        payloads = []
        for index, (case, choice) in enumerate(zip(cases, choices, strict=True)):
            path = Path(folder, f"job-{index}.toml")
            path.write_text(job_to_toml(case.job))
            payloads.append(payload_of(path, choice, kind))
        # The profiler does not see what gloo's threads free, so the allocator is measured for single processes only.
        payload = {"cases": payloads, "steps": 3, "allocator": ranks == 1}
        environment = {"OMP_NUM_THREADS": "1", **({} if kind == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})}
        with launch.local("meshwright.rehearse.work:measure", payload, ranks, folder, env=environment) as processes:
            answers = processes.wait()
        all_ranks = list(range(ranks))
        payload = {"cases": [{**case, "ranks": all_ranks} for case in payloads]}
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with launch.local("bench.runs.memory:rehearse_all", payload, 1, folder, env=environment) as processes:
            rehearsed = processes.wait()[0]
    for index, (case, choice) in enumerate(zip(cases, choices, strict=True)):
        formulas = [choice.memory[coordinates(case.layout, rank).pp].allocated for rank in all_ranks]
        row = _row(case, [Peak.from_dict(peak) for peak in rehearsed[index]], formulas)
        row["tracked"] = max(rank[index]["peak_bytes"] for rank in answers)
        if ranks == 1:
            row["allocator"] = answers[0][index]["allocator_bytes"]
        yield row


def rehearse_all(payload: Mapping[str, Any], context: Context) -> list[list[dict[str, Any]]]:
    """The function of the process that rehearses all cases of a group."""
    from meshwright.rehearse import work

    return [work.rehearse(case, context) for case in payload["cases"]]


def _row(case: MemoryCase, peaks: Sequence[Peak], formulas: Sequence[int]) -> dict[str, Any]:
    """The largest figures over the ranks, in bytes."""
    worst = max(peaks, key=lambda peak: peak.total)
    figures = {"formula": max(formulas), "rehearsed": worst.total, "ranks": len(peaks)}
    return {"case": case.name, **figures, "moment": worst.moment, "parts": dict(worst.parts)}


def _text(row: Mapping[str, Any]) -> str:
    truth = row.get("tracked", row["rehearsed"])
    words = [f"{row['case']:<52}", f"formula {row['formula'] / 2**20:>9.2f} ({row['formula'] / truth - 1:+7.2%})"]
    words.append(f"rehearsed {row['rehearsed'] / 2**20:>9.2f}")
    if "tracked" in row:
        words[-1] += f" ({row['rehearsed'] / truth - 1:+7.3%})"
        words.append(f"tracked {truth / 2**20:>9.2f} MiB")
        if "allocator" in row:
            gap = row["rehearsed"] / row["allocator"] - 1
            words.append(f"allocator {row['allocator'] / 2**20:>9.2f} ({gap:+7.3%})")
    else:
        words.append(f"MiB, {row['ranks']} ranks in {row['seconds']:.0f} s of CPU")
    return "  ".join([*words, row["moment"]])


def _summary(rows: list[dict[str, Any]]) -> None:
    def line(name: str, figure: str, truth: str) -> None:
        errors = [abs(row[figure] / row[truth] - 1) for row in rows if truth in row and figure in row]
        if errors:
            exact = sum(error == 0 for error in errors)
            print(
                f"{name:<34} mean {statistics.mean(errors):8.3%}  max {max(errors):8.3%}  exact {exact}/{len(errors)}"
            )

    print()
    line("rehearsal against live tensors", "rehearsed", "tracked")
    line("rehearsal against the allocator", "rehearsed", "allocator")
    line("formula against live tensors", "formula", "tracked")
    line("formula against the rehearsal", "formula", "rehearsed")


if __name__ == "__main__":
    sys.exit(main())
