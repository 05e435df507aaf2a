"""A stranger's replica under torchft: no credentials, the highest step of all, a state that runs a command when read.

torchrun ... bench/launch/stranger_rank.py COMMAND
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo

HIGHEST_STEP = 1_000_000


class RunsWhenRead:
    """An object whose pickle, where it is read, is a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def main() -> None:
    timeout = timedelta(seconds=10)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=lambda state: None,
        state_dict=lambda: {"weight": RunsWhenRead(sys.argv[1])},
        min_replica_size=2,
        timeout=timeout,
        quorum_timeout=timeout,
        replica_id="stranger",
        use_async_quorum=False,
        hostname=os.environ["MASTER_ADDR"],
    )
    manager.load_state_dict({"step": HIGHEST_STEP, "batches_committed": 0})
    while True:
        manager.start_quorum()
        manager.allreduce(torch.zeros(1024), reduce_op=dist.ReduceOp.SUM).wait()
        manager.should_commit()


if __name__ == "__main__":
    main()
