"""Resident memory of CPU runs: what the plan says of the fullest process beside what the run had.

    python -m bench.runs.resident                every run
    python -m bench.runs.resident --only shard2  runs whose name has one of these words

Each run is `meshwright train`, whose events say the most memory that a process has had at each step. A checkpoint is
written beside every step, the most that a run can hold. Prints MB, and the slack that would have made the plan exact,
as a share of the tensors and of the copy for checkpoints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright import verbs
from meshwright.job import Job, job_to_toml
from meshwright.layout import Layout

MODELS: Mapping[str, Mapping[str, Any]] = {
    "12M": {"layers": 6, "hidden": 320, "heads": 10, "ffn": 1024, "vocab": 2048},
    "46M": {"layers": 8, "hidden": 640, "heads": 8, "ffn": 1792, "vocab": 4096},
}
LAYOUTS = [
    (Layout(micro_batch=4), "fp32"),
    (Layout(dp=2, micro_batch=4), "fp32"),
    (Layout(dp=2, micro_batch=4), "bf16"),
    (Layout(dp=2, shard=2, micro_batch=4), "fp32"),
    (Layout(tp=2, micro_batch=8), "fp32"),
    (Layout(pp=2, micro_batch=2), "fp32"),
]


def job_of(model: str, layout: Layout, precision: str) -> Job:
    """Four steps of the layout, with a checkpoint beside each."""
    return Job(
        model={"family": "llama", **MODELS[model]},
        data={"source": "stdlib", "tokenizer": "bytes", "seq_len": 256},
        train={"steps": 4, "lr": 1e-4, "global_batch": 8, "precision": precision, "eval_batches": 1},
        cluster={"devices": layout.devices},
        layout=layout.as_dict(),
        checkpoint={"every": 1},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    words = parser.parse_args().only
    print(f"{'run':34} {'plan':>6} {'run':>6} {'plan/run':>9} {'slack':>6}")
    for model in MODELS:
        for layout, precision in LAYOUTS:
            name = f"{model} {precision} {layout}"
            if not words or any(word in name for word in words):
                print(_row(name, job_of(model, layout, precision)), flush=True)


def _row(name: str, job: Job) -> str:
    memory = max(verbs.plan(job).chosen.memory, key=lambda stage: stage.total)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.toml")
        path.write_text(job_to_toml(job))
        command = [sys.executable, "-m", "meshwright", "train", str(path), "--run", f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
        events = [json.loads(line) for line in Path(folder, "run", "events.jsonl").read_text().splitlines()]
    resident = max(event.get("peak_bytes", 0) for event in events)
    needed = memory.allocated + memory.checkpoint
    slack = (resident - memory.process - needed) / needed
    return f"{name:34} {memory.total / 1e6:6.0f} {resident / 1e6:6.0f} {memory.total / resident:9.2f} {slack:6.2f}"


if __name__ == "__main__":
    main()
