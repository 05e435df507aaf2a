"""Communication of tensor-parallel ranks: work as integers from rank 0, sums, and logits back to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.engine.scheduler import Work
from meshwright.launch import Context
from meshwright.nn import backend, gpu_type
from meshwright.process_group import store_of

#: Integers in the first broadcast of a step: enough for decoding; a step that reads prompts sends the rest after it.
_FIRST_MESSAGE = 128
#: A rank waits for the next request without limit; `launch` ends the others if a rank dies.
_COLLECTIVE_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` tensor-parallel ones. In a world of one every method returns its input."""

    rank: int = 0
    world: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum of x over the ranks, on every rank, in fp32: partial sums of bf16 lose digits."""
        if self.world == 1:
            return x
        total = x.float() if x.dtype is not torch.float32 else x
        dist.all_reduce(total)
        return total.to(x.dtype)

    def gather(self, logits: Tensor, vocab: int) -> Tensor | None:
        """Rank 0: logits [R, vocab] from the ranks' parts [R, rows of a part]; the others: None."""
        if self.world == 1:
            return logits
        part = logits.float()
        parts = [torch.empty_like(part) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(part, parts)
        return None if parts is None else torch.cat(parts, dim=-1)[:, :vocab]

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values."""
        if self.world == 1:
            return value
        smallest = torch.tensor(value)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def send(self, work: Work | None) -> None:
        """Rank 0: sends the next step to the others; None is the end."""
        if self.world == 1:
            return
        numbers = work.encode() if work is not None else []
        first = torch.zeros(_FIRST_MESSAGE, dtype=torch.int64)
        sent = numbers[: _FIRST_MESSAGE - 1]
        first[: len(sent) + 1] = torch.tensor([len(numbers), *sent], dtype=torch.int64)
        dist.broadcast(first, 0)
        if len(numbers) > len(sent):
            dist.broadcast(torch.tensor(numbers[len(sent) :], dtype=torch.int64), 0)

    def receive(self) -> Work | None:
        """Other ranks: the argument of rank 0's `send`."""
        first = torch.zeros(_FIRST_MESSAGE, dtype=torch.int64)
        dist.broadcast(first, 0)
        count, *numbers = first.tolist()
        if count == 0:
            return None
        if count > len(numbers):
            rest = torch.zeros(count - len(numbers), dtype=torch.int64)
            dist.broadcast(rest, 0)
            numbers += rest.tolist()
        return Work.decode(numbers[:count])


def join(context: Context | None) -> Ranks:
    """The ranks of `context`, connected; one rank without a context. Ended by `leave`."""
    if context is None or context.world == 1:
        return Ranks()
    dist.init_process_group(
        backend(torch.device(gpu_type() or "cpu")),
        store=store_of(context),
        rank=context.rank,
        world_size=context.world,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    return Ranks(context.rank, context.world)


def leave(ranks: Ranks) -> None:
    """Destroys the process group."""
    if ranks.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
