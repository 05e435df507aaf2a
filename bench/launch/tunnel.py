"""What the tunnel of docs/security.md costs: gloo between two hosts of this machine, without it and with it.

    python -m bench.launch.tunnel

Needs root, wireguard-tools and, where the kernel has no WireGuard, wireguard-go, which is then measured. Prints the
bytes per second of a broadcast, the best of ROUNDS, and the latency of a sum of one number, the median of CALLS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hosts import hosts
from tests.test_transit import interface, tunnel

MEBIBYTES, ROUNDS, CALLS = 64, 5, 200
SECONDS = 120.0

#: rank, folder: prints bytes per second and seconds of latency as JSON.
RANK = f"""
import json, statistics, sys, time, torch, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(folder + "/meeting", 2), rank=rank, world_size=2)
def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
data, one = torch.zeros({MEBIBYTES} << 20, dtype=torch.uint8), torch.zeros(1)
def send():
    dist.broadcast(data, 0)
    dist.barrier()
best = min(timed(send) for _ in range({ROUNDS}))
latency = statistics.median(timed(lambda: dist.all_reduce(one)) for _ in range({CALLS}))
print(json.dumps([({MEBIBYTES} << 20) / best, latency]))
"""


def measured(pair: Sequence[Any], over: str) -> tuple[float, float]:
    """(bytes per second, seconds of latency) of gloo between two hosts over an interface."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": over, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            host.start([sys.executable, "-c", RANK, rank, folder], env=environment, stdout=subprocess.PIPE, text=True)
            for rank, host in enumerate(pair)
        ]
        answers = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    rate, latency = json.loads(answers[0])
    return rate, latency


def main() -> None:
    print("| between two hosts | bytes per second | latency of a sum |\n|---|---|---|")
    with hosts(2) as pair, tempfile.TemporaryDirectory() as folder:
        for words, over in (("in the clear", pair[0].interface), ("through the tunnel", interface())):
            if over == interface():
                tunnel(pair, Path(folder))
            rate, latency = measured(pair, over)
            print(f"| {words} | {rate / 1e6:,.0f} MB/s | {latency * 1e3:.2f} ms |")


if __name__ == "__main__":
    main()
