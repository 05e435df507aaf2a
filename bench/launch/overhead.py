"""What starting ranks elsewhere costs: `train` of one small job of three ranks here, with agents, and on Ray.

    python -m bench.launch.overhead [--rounds 3] [--steps 80]

Needs root, for the three hosts are network namespaces (tests/hosts.py), and `pip install 'meshwright[ray]'`. Ranks here
talk over `lo`, those of hosts over virtual cables (veth): that is part of what differs. Prints a line for each place,
medians over the rounds, in which places take turns:

start   seconds from the command to the end of the first step; Ray and its nodes run before
step    median seconds of a step
driver  processor time of the driver's process for each step, hub included, in the middle half of the run

and below, that of a rank which tells of a step every PACE_SECONDS and does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright import launch
from meshwright.run import RunFolder
from tests.launch.agents import PATHS, AgentProcesses
from tests.ray_cluster import RayCluster, ray_cluster

JOB = """
[model]
family = "llama"
layers = 4
hidden = 128
heads = 4
ffn = 256
vocab = 257
[data]
source = "words.txt"
seq_len = 128
tokenizer = "bytes"
[train]
lr = 1e-3
steps = {steps}
global_batch = 6
precision = "fp32"
compile = false
[cluster]
devices = 3
[layout]
dp = 3
[checkpoint]
every = 0
"""
PLACES = ("local", "agents", "ray")
PACE_SECONDS, TOLD = 0.1, 100
LIMIT_SECONDS = 240.0
TICKS = os.sysconf("SC_CLK_TCK")
MESHWRIGHT = [sys.executable, "-m", "meshwright"]
ENVIRONMENT = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Cost:
    """Seconds: of the start, of a step, and of the driver's processor for each step."""

    start: float
    step: float
    driver: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "words.txt").write_text("".join(f"line {number} of {number**2}\n" for number in range(20000)))
        (folder / "job.toml").write_text(JOB.format(steps=options.steps))
        rank = rank_seconds(folder)
        with ray_cluster(folder / "ray") as cluster:
            rounds = [{on: cost(cluster, folder, on, options.steps) for on in PLACES} for _ in range(options.rounds)]
    print(
        "| launch.on | start, s | step, ms | driver, ms of processor for a step | of the step |\n|---|---|---|---|---|"
    )
    for on in PLACES:
        costs = [one[on] for one in rounds]
        start, step, driver = (statistics.median(getattr(c, key) for c in costs) for key in ("start", "step", "driver"))
        every = ", ".join(f"{one.start:.1f}" for one in costs)
        print(f"| {on} | {start:.1f} ({every}) | {step * 1e3:.0f} | {driver * 1e3:.2f} | {driver / step:.1%} |")
    print(f"a rank: {rank * 1e3:.2f} ms of processor for a step that it tells of, {rank / PACE_SECONDS:.1%} of 100 ms")


def cost(cluster: RayCluster, folder: Path, on: str, steps: int) -> Cost:
    """One run, in a folder of its own."""
    run = RunFolder(folder / f"run-{on}-{time.monotonic_ns()}")
    words = [*MESHWRIGHT, "train", str(folder / "job.toml"), "--run", str(run.path)]
    options: dict[str, Any] = {"env": {**cluster.environment, **ENVIRONMENT}, "cwd": folder}
    with open(f"{run.path}.log", "w") as log:
        options |= {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        began = time.time()
        if on == "local":
            driver = subprocess.Popen(words, **options)
        elif on == "ray":
            driver = cluster.head.start([*words, "launch.on=ray", f"launch.address={cluster.address}"], **options)
        else:
            address = f"launch.address={cluster.head.address}:0"
            driver = cluster.head.start([*words, "launch.on=agents", address], **options)
            agent = [sys.executable, "-m", "meshwright.launch.agent", "--run", str(run.path), "--devices", "1"]
            for host in cluster.hosts:
                host.start(agent, **options)
    try:
        first, last = steps // 4, steps * 3 // 4
        at_first = _when(driver, run, first, lambda: _processor_seconds(driver.pid))
        at_last = _when(driver, run, last, lambda: _processor_seconds(driver.pid))
        if driver.wait(LIMIT_SECONDS) != 0:
            raise SystemExit(Path(f"{run.path}.log").read_text())
    finally:
        driver.kill()
    times = [float(event["time"]) for event in run.steps()]
    step = statistics.median(
        after - before for before, after in zip(times[first:last], times[first + 1 :], strict=False)
    )
    (from_step, from_seconds), (to_step, to_seconds) = at_first, at_last
    return Cost(times[0] - began, step, (to_seconds - from_seconds) / (to_step - from_step))


def _when(driver: Any, run: RunFolder, step: int, read: Callable[[], float]) -> tuple[int, float]:
    """The step that is done, and what `read` returns then, once `step` is."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        done = len(run.steps()) if run.events.exists() else 0
        if done >= step:
            return done, read()
        if driver.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(Path(f"{run.path}.log").read_text())
        time.sleep(0.2)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rank_seconds(folder: Path) -> float:
    """Processor time of a rank that only tells of steps, over TLS, for each of them."""
    cluster = AgentProcesses(folder, {"node": 1})
    group = launch.RankGroup("rank", "bench.launch.overhead:tell_of_steps", {}, 1)
    with launch.start(cluster, [group], folder / "logs") as started:
        return float(started.wait()[0])


def tell_of_steps(payload: Any, context: launch.Context) -> float:
    """A rank: its processor seconds for each step that it has told of."""
    event = {"kind": "step", "step": 1, "loss": 1.234567, "grad_norm": 0.123456, "seconds": PACE_SECONDS, "tokens": 768}
    context.tell("event", event)
    time.sleep(1)  # the connection is there
    before = time.process_time()
    for _ in range(TOLD):
        context.tell("event", event)
        time.sleep(PACE_SECONDS)
    return (time.process_time() - before) / TOLD


if __name__ == "__main__":
    main()
