"""Training speed: Meshwright beside plain torch DDP and one compiled process, interleaved, on this machine.

    python bench/speed/train.py                      five rounds of 12 steps, all four
    python bench/speed/train.py --rounds 2 --steps 6 --only ddp compiled
    python bench/speed/train.py --precision fp32     as on a CPU that is slow at bf16

Every side trains the same Llama-style model (25.7M parameters without embeddings) from random weights on the same
batches of the Python standard library's sources: 8 x 512 tokens per step, AdamW, clipping at 1.0, bf16 unless told
otherwise. A round starts each side once as new processes, in an order that changes with the round. On a CPU every side
has all cores: two processes of one thread (DDP, and Meshwright as it plans), or one process of two threads;
`meshwright-one` is ours in the latter form, compiled. `torch.compile` keeps its cache between rounds, so only the first
round compiles from scratch.

Prints a Markdown table. tokens/s: the median over the rounds of each round's median over the steps after its warm-up,
with the lowest and highest round. Peak memory: resident bytes of all processes of a side together, sampled five times a
second. First step: seconds from the command to the end of its first step, start and compilation included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from meshwright.cluster import available_cores
from meshwright.data import Manifest, build_manifest
from meshwright.job import Job, job_to_toml
from meshwright.run import RunFolder

MIB = 1024**2
PEER = Path(__file__).with_name("train_peers.py")
SHAPE = {"layers": 8, "hidden": 512, "heads": 8, "ffn": 1408, "vocab": 4096}
SEQ_LEN, GLOBAL_BATCH, LR, WEIGHT_DECAY, SEED = 512, 8, 3e-4, 0.1, 0
WARM_STEPS = 2  # left out of each round's median
SAMPLE_SECONDS = 0.2
LIMIT_SECONDS = 900.0


@dataclass
class Result:
    """The measurements of one side, an entry per round."""

    tokens_per_second: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    first_step_seconds: list[float] = field(default_factory=list)
    last_loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TrainBench:
    """What every side shares. `folder` holds batches.npz and the indexed data."""

    folder: Path
    job: Job
    device: str
    steps: int
    processes: int


def job_of(steps: int, precision: str) -> Job:
    """The job that Meshwright trains. The peers' settings come from the same constants."""
    return Job(
        model={"family": "llama", **SHAPE},
        data={"source": "stdlib", "seq_len": SEQ_LEN, "tokenizer": "bpe"},
        train={
            "steps": steps,
            "lr": LR,
            "global_batch": GLOBAL_BATCH,
            "precision": precision,
            "warmup_steps": 0,
            "decay": "constant",
            "weight_decay": WEIGHT_DECAY,
            "eval_batches": 1,
            "seed": SEED,
        },
    )


def write_batches(manifest: Manifest, steps: int, path: Path) -> None:
    """The batches that Meshwright will draw, for the peers: int64 [steps, batch, seq_len]."""
    batches = [manifest.batch(SEED, step, GLOBAL_BATCH, 0, GLOBAL_BATCH) for step in range(1, steps + 1)]
    arrays = {
        "inputs": np.stack([np.asarray(batch["input_ids"]) for batch in batches]).astype(np.int64),
        "targets": np.stack([np.asarray(batch["targets"]) for batch in batches]).astype(np.int64),
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]


class Memory:
    """Samples the resident memory of processes and their children, until `stop`."""

    def __init__(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        self.peak_bytes = 0
        self._processes = [psutil.Process(process.pid) for process in processes]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            total = 0
            for process in self._processes:
                try:
                    total += sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
                except psutil.Error:
                    continue  # a process ended meanwhile
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak_bytes


def run_peer(bench: TrainBench, compiled: bool, result: Result) -> None:
    """Plain torch: DDP over `bench.processes` processes, or one compiled process with every core."""
    world = 1 if compiled else bench.processes
    work = Path(tempfile.mkdtemp(dir=bench.folder))
    settings = {
        "shape": {**SHAPE, "seq_len": SEQ_LEN},
        "device": bench.device,
        "store": str(work / "store"),
        "compile": compiled,
        "batches": str(bench.folder / "batches.npz"),
        "global_batch": GLOBAL_BATCH,
        "steps": bench.steps,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "precision": bench.job.train.precision,
    }
    (work / "settings.json").write_text(json.dumps(settings))
    threads = max(1, available_cores() // world)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / "compiled"),
    }
    started = time.time()
    processes = []
    for rank in range(world):
        command = [sys.executable, str(PEER), str(work / "settings.json"), str(rank), str(world)]
        out = open(work / f"out-{rank}", "wb")  # noqa: SIM115 - closed with the process below
        processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        out.close()
    try:
        memory = Memory(processes)
        codes = [process.wait(LIMIT_SECONDS) for process in processes]
        peak = memory.stop()
    finally:
        for process in processes:
            process.kill()
    text = (work / "out-0").read_text()
    if any(codes):
        sys.exit(f"a peer failed:\n{text[-3000:]}")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    add(result, started, peak, [(line["seconds"], line["at"], line["loss"]) for line in lines])


def run_ours(bench: TrainBench, result: Result, *overrides: str) -> None:
    """`meshwright train` on the job with `overrides`, measured from its events."""
    run = RunFolder(Path(tempfile.mkdtemp(dir=bench.folder)) / "run").create()
    shutil.copytree(bench.folder / "data", run.manifest)  # indexing is not measured
    job = run.path.parent / "job.toml"
    job.write_text(job_to_toml(bench.job))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / "compiled-ours")}
    command = [sys.executable, "-m", "meshwright", "train", str(job), *overrides, "--run", str(run.path), "--json"]
    started = time.time()
    with open(run.path.parent / "out", "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        memory = Memory([process])
        code = process.wait(LIMIT_SECONDS)
        peak = memory.stop()
    finally:
        process.kill()
    if code:
        sys.exit(f"meshwright train failed:\n{(run.path.parent / 'out').read_text()[-3000:]}")
    add(result, started, peak, [(step["step_seconds"], step["time"], step["loss"]) for step in run.steps()])


def add(result: Result, started: float, peak_bytes: int, steps: Sequence[tuple[float, float, float]]) -> None:
    """One round. steps: (seconds, unix time of its end, loss)."""
    seconds = statistics.median(step[0] for step in steps[WARM_STEPS:])
    result.tokens_per_second.append(GLOBAL_BATCH * SEQ_LEN / seconds)
    result.peak_bytes.append(peak_bytes)
    result.first_step_seconds.append(steps[0][1] - started)
    result.last_loss.append(steps[-1][2])


def table(names: Sequence[str], results: dict[str, Result], steps: int) -> str:
    """Markdown, a row per side."""
    best = max(statistics.median(r.tokens_per_second) for name, r in results.items() if r.tokens_per_second)
    lines = [
        f"| side | tokens/s (lowest - highest) | of the best | peak, MiB | first step, s | loss at step {steps} |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        r = results[name]
        speed = statistics.median(r.tokens_per_second)
        lines.append(
            f"| {name} | {speed:,.0f} ({min(r.tokens_per_second):,.0f} - {max(r.tokens_per_second):,.0f}) "
            f"| {speed / best:.2f} | {statistics.median(r.peak_bytes) / MIB:,.0f} "
            f"| {statistics.median(r.first_step_seconds):.1f} (first round {r.first_step_seconds[0]:.1f}) "
            f"| {statistics.median(r.last_loss):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="per round; the first two are not counted")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--only", nargs="+", choices=["ddp", "compiled", "meshwright", "meshwright-one"])
    parser.add_argument("--folder", type=Path, help="folder for all files (default: a temporary one)")
    options = parser.parse_args()
    if options.steps <= WARM_STEPS:
        parser.error(f"--steps must be above {WARM_STEPS}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = torch.cuda.device_count() if device == "cuda" else 2
    with tempfile.TemporaryDirectory(prefix="meshwright-bench-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        job = job_of(options.steps, options.precision)
        print(f"indexing the data in {folder}", file=sys.stderr)
        write_batches(build_manifest(job, folder / "data"), options.steps, folder / "batches.npz")
        bench = TrainBench(folder, job, device, options.steps, processes)
        sides: dict[str, Callable[[Result], None]] = {
            "ddp": lambda result: run_peer(bench, False, result),
            "compiled": lambda result: run_peer(bench, True, result),
            "meshwright": lambda result: run_ours(bench, result),
            "meshwright-one": lambda result: run_ours(bench, result, "cluster.devices=1", "train.compile=true"),
        }
        names = options.only or list(sides)
        results = {name: Result() for name in names}
        for turn in range(options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                sides[name](results[name])
                speed = results[name].tokens_per_second[-1]
                print(f"round {turn + 1}: {name} {speed:,.0f} tokens/s", file=sys.stderr)
        print(table(names, results, options.steps))


if __name__ == "__main__":
    main()
