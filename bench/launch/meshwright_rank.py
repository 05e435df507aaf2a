"""A rank under Meshwright's launcher: sums ones over gloo, step by step."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from steps import STEP_SECONDS, StepLog, newest_commit

from meshwright.launch import Context
from meshwright.process_group import process_group
from meshwright.run import RunFolder


class FencedLog(StepLog):
    """Commits as a checkpoint does: what was prepared in the lease is renamed out of it."""

    def __init__(self, folder: Path, context: Context) -> None:
        super().__init__(folder, context.rank, context.world)
        self._lease = RunFolder(folder).lease(context.generation)

    def _append(self, name: str, step: int) -> None:
        if name == "commits.jsonl":
            prepared = self._lease / "prepared"
            prepared.touch()
            os.rename(prepared, self.folder / "committed")
        super()._append(name, step)


def work(payload: dict[str, Any], context: Context) -> None:
    folder = Path(payload["folder"])
    torch.set_num_threads(1)
    with process_group(context, "gloo"):
        log = FencedLog(folder, context)
        first = torch.tensor([newest_commit(folder) if context.rank == 0 else 0])
        dist.broadcast(first, 0)
        for step in range(int(first) + 1, payload["steps"] + 1):
            time.sleep(STEP_SECONDS)
            ones = torch.ones(1024)
            dist.all_reduce(ones)
            if int(ones[0]) != context.world:
                raise RuntimeError(f"rank {context.rank}, step {step}: {ones[0]} of {context.world} ranks were summed")
            log.made(step)
            if context.rank == 0:
                log.commit(step)
