"""A replica of one rank under torchft: sums ones over gloo, step by step. Imports nothing of Meshwright.

    torchrun ... bench/launch/torchft_rank.py FOLDER STEPS TIMEOUT_SECONDS NAME

TIMEOUT_SECONDS is that of collectives and quorum, 0 for torchft's own 60. NAME is this replica's.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from steps import STEP_SECONDS, StepLog, newest_commit
from torchft import Manager, ProcessGroupGloo


def main() -> None:
    folder, steps, timeout_seconds, name = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_seconds or 60)
    weights = {"weight": torch.zeros(1024)}
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=weights.update,
        state_dict=lambda: dict(weights),
        min_replica_size=2,
        timeout=timeout,
        quorum_timeout=timeout,
        connect_timeout=timeout,
        replica_id=name,
        use_async_quorum=False,
        hostname=os.environ["MASTER_ADDR"],
    )
    manager.load_state_dict({"step": newest_commit(folder), "batches_committed": 0})
    log, members = StepLog(folder, 0, 0), ""
    while manager.current_step() < steps:
        manager.start_quorum()
        now = f"{manager._quorum_id} of {manager.num_participants()}"
        if now != members:
            log, members = StepLog(folder, manager.participating_rank() or 0, manager.num_participants()), now
        time.sleep(STEP_SECONDS)
        ones = torch.ones(1024)
        manager.allreduce(ones, reduce_op=dist.ReduceOp.SUM).wait()
        if not manager.should_commit():
            continue
        weights["weight"] += ones / manager.num_participants()
        log.made(manager.current_step())
        if manager.participating_rank() == 0:
            log.commit(manager.current_step())
    manager.shutdown()


if __name__ == "__main__":
    main()
