"""The main job from end to end, as `make demo` runs it: plan, verify, train, serve, report.

Every step is a command that you can type; it is printed before it runs. A second run continues where the first ended,
and after the training it only serves the checkpoint. `rm -r runs/demo` starts over.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from meshwright.data import Manifest, bigram_bits_per_byte
from meshwright.run import RunFolder
from meshwright.serve.client import stream_grpc, stream_http

ROOT = Path(__file__).resolve().parent.parent
JOB = "examples/demo.toml"
RUN = RunFolder(ROOT / "runs" / "demo")
PROMPT = "def read_file(path):\n"
START_SECONDS = 120.0  # longest wait for the server


def main() -> int:
    began = time.monotonic()
    os.chdir(ROOT)
    say("1. Plan: the layout for this machine")
    meshwright("plan", JOB)
    finished = any(event["event"] == "end" and event["finished"] for event in RUN.read_events())
    if not finished:
        say("2. Verify: two processes against one device, on a small twin of the job, step by step")
        twin = ("model.layers=2", "model.hidden=96", "model.ffn=256", "data.seq_len=64")
        meshwright("verify", JOB, *twin, "--steps", "5")
        say("3. Train (kill it at any moment: `make demo` continues)")
        resume = ("--resume",) if RUN.job.exists() else ()
        meshwright("train", JOB, *resume)
    else:
        say(f"2, 3. Already verified and trained: {RUN.path.relative_to(ROOT)} (remove the folder to repeat it)")
    compare_with_bigram()
    say("4. Serve the checkpoint, and stream a completion over both protocols")
    serve_and_stream()
    print(f"\nreport      {RUN.report.relative_to(ROOT)}   (one HTML file: open it in a browser)")
    checkpoint = sorted((RUN.checkpoints).glob("step-*"))[-1] / "model"
    print(f"checkpoint  {checkpoint.relative_to(ROOT)}   (a Hugging Face folder: `transformers` loads it)")
    print(f"took        {time.monotonic() - began:.0f} s")
    return 0


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def command(*words: str) -> list[str]:
    print("$ meshwright " + shlex.join(words), flush=True)
    return [sys.executable, "-m", "meshwright", *words]


def meshwright(*words: str) -> None:
    status = subprocess.run(command(*words), check=False).returncode
    if status:
        sys.exit(status)


def compare_with_bigram() -> None:
    """Held-out bits per byte of the model, and of a bigram model of the same bytes."""
    model = next(event["bits_per_byte"] for event in reversed(RUN.read_events()) if "bits_per_byte" in event)
    manifest = Manifest.open(RUN.manifest)
    bigram = bigram_bits_per_byte(manifest.text("train"), manifest.text("held_out"))
    print(f"\nheld-out bits per byte: {model:.3f}; a bigram model of the same bytes: {bigram:.3f}")
    if model > 0.85 * bigram:
        sys.exit("the model is not well below the bigram model: something is wrong")


def serve_and_stream() -> None:
    words = command("serve", "runs/demo", "serve.http_port=0", "serve.grpc_port=0")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                sys.exit(server.wait() or 4)
            server_at = json.loads(line)
            http = stream_http(server_at["http"], PROMPT, max_tokens=60, temperature=0.0)
            grpc = stream_grpc(server_at["grpc"], PROMPT, model=server_at["model"], max_tokens=60, temperature=0.7)
            for name, pieces in ((f"HTTP {server_at['http']}", http), (f"gRPC {server_at['grpc']}", grpc)):
                print(f"\n--- {name}\n{PROMPT}", end="", flush=True)
                count, begin = 0, time.monotonic()
                for piece in pieces:
                    print(piece, end="", flush=True)
                    count += 1
                print(f"\n--- {count} pieces in {time.monotonic() - begin:.2f} s")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=START_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
