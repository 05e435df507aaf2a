"""What torch.compile gains in a training step: forward and backward of a half batch, eager and compiled, on one thread.

    python bench/speed/step.py                        fp32, our model and the peer's of train_peers.py
    python bench/speed/step.py --eager --rounds 6     without compilation, which takes minutes

Milliseconds of CPU time, which other work on the machine disturbs less, interleaved, the best round of each.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from train import GLOBAL_BATCH, SEQ_LEN, SHAPE, job_of
from train_peers import PeerModel

from meshwright.families import shape_of_job
from meshwright.families.llama.module import build
from meshwright.nn import cross_entropy_sum


def sides(eager: bool) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of each side, on the same tokens."""
    draw = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(0, SHAPE["vocab"], (GLOBAL_BATCH // 2, SEQ_LEN), generator=draw) for _ in range(2))
    positions = torch.arange(SEQ_LEN).expand_as(ids)
    ours, peer = build(shape_of_job(job_of(1, "fp32"))), PeerModel({**SHAPE, "seq_len": SEQ_LEN})
    for parameter in ours.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)

    def step_ours(model: nn.Module) -> None:
        (cross_entropy_sum(model(ids, positions=positions), targets) / targets.numel()).backward()
        model.zero_grad(set_to_none=True)

    def step_peer(model: nn.Module) -> None:
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
        model.zero_grad(set_to_none=True)

    found: dict[str, Callable[[], None]] = {"ours": lambda: step_ours(ours), "peer": lambda: step_peer(peer)}
    if not eager:
        compiled, peer_compiled = copy.deepcopy(ours), copy.deepcopy(peer)
        for block in compiled.blocks.values():
            block.compile(dynamic=False)
        peer_compiled.compile()
        found["ours, compiled"] = lambda: step_ours(compiled)
        found["peer, compiled"] = lambda: step_peer(peer_compiled)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="leave the compiled sides out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    steps = sides(options.eager)
    for step in steps.values():
        step()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    for name, found in seconds.items():
        print(f"{name:<16} {min(found) * 1e3:8,.0f} ms (to {max(found) * 1e3:,.0f})")


if __name__ == "__main__":
    main()
