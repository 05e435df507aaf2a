"""Start-up seconds of plan, train and serve.

    python bench/speed/startup.py [--rounds 5] [--json]

Of the job of `meshwright new`. plan: the whole command. train: to the end of the first step of a resumed run, whose
data are indexed. serve: to the line with the addresses.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from meshwright.run import RunFolder

MESHWRIGHT = [sys.executable, "-m", "meshwright"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        job, run = root / "job.toml", root / "run"
        job.write_text(subprocess.run([*MESHWRIGHT, "new"], check=True, capture_output=True, text=True).stdout)
        _train(job, run, steps=1)
        rounds = [_round(job, run, index) for index in range(options.rounds)]
    figures = {name: [one[name] for one in rounds] for name in rounds[0]}
    if options.json:
        print(json.dumps(figures))
        return
    print("| command | median s | all rounds |\n|---|---|---|")
    for name, seconds in figures.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} |")


def _round(job: Path, run: Path, index: int) -> dict[str, float]:
    return {
        "help": _command("--help"),
        "plan": _command("plan", str(job)),
        "train, to the first step": _train(job, run, steps=index + 2, resume=True),
        "serve, to ready": _serve(run),
    }


def _command(*words: str) -> float:
    start = time.monotonic()
    subprocess.run([*MESHWRIGHT, *words], check=True, capture_output=True)
    return time.monotonic() - start


def _train(job: Path, run: Path, steps: int, resume: bool = False) -> float:
    start = time.time()
    words = ["train", str(job), f"train.steps={steps}", "--run", str(run), *(["--resume"] if resume else [])]
    subprocess.run([*MESHWRIGHT, *words], check=True, capture_output=True)
    return float(RunFolder(run).steps()[-1]["time"]) - start


def _serve(run: Path) -> float:
    start = time.monotonic()
    words = ["serve", str(run), "serve.http_port=0", "serve.grpc_port=0"]
    with subprocess.Popen([*MESHWRIGHT, *words], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        seconds = time.monotonic() - start
        server.send_signal(signal.SIGTERM)
    return seconds


if __name__ == "__main__":
    main()
