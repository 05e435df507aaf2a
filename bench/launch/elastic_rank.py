"""A rank of plain torch under torchrun: sums ones over gloo, step by step. Imports nothing of Meshwright.

    torchrun ... bench/launch/elastic_rank.py FOLDER STEPS TIMEOUT_SECONDS

TIMEOUT_SECONDS is that of the collectives, 0 for torch's own.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from steps import STEP_SECONDS, StepLog, newest_commit


def main() -> None:
    folder, steps, timeout_seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds) if timeout_seconds else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    log = StepLog(folder, rank, world)
    first = torch.tensor([newest_commit(folder) if rank == 0 else 0])
    dist.broadcast(first, 0)
    for step in range(int(first) + 1, steps + 1):
        time.sleep(STEP_SECONDS)
        ones = torch.ones(1024)
        dist.all_reduce(ones)
        if int(ones[0]) != world:
            raise RuntimeError(f"rank {rank}, step {step}: {ones[0]} of {world} ranks were summed")
        log.made(step)
        if rank == 0:
            log.commit(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
