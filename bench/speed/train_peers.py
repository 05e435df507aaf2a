"""A process of a training peer: plain torch, a Llama-style model, AdamW, bf16 autocast. Started by train.py.

    python bench/speed/train_peers.py SETTINGS.json RANK WORLD

Imports nothing of Meshwright. Reads its batches from a .npz file. Rank 0 prints a JSON line per step: step, seconds,
loss, and at (unix time of the step's end).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions."""
    low, high = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD


class PeerLayer(nn.Module):
    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        hidden, ffn = shape["hidden"], shape["ffn"]
        self.heads = shape["heads"]
        self.attn_norm, self.ffn_norm = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.attn_norm(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class PeerModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocab]."""

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape["vocab"], shape["hidden"])
        self.layers = nn.ModuleList(PeerLayer(shape) for _ in range(shape["layers"]))
        self.norm = nn.RMSNorm(shape["hidden"], eps=1e-5)
        self.out = nn.Linear(shape["hidden"], shape["vocab"], bias=False)
        width = shape["hidden"] // shape["heads"]
        rates = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(shape["seq_len"]), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.out(self.norm(x))


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    cuda = settings["device"] == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    model: Any = PeerModel(settings["shape"]).to(device)
    optimizer = torch.optim.AdamW(
        groups(model, settings["weight_decay"]), lr=settings["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    if world > 1:
        store = dist.FileStore(settings["store"], world)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, device_ids=[rank] if cuda else None)
    if settings["compile"]:
        model = torch.compile(model)
    batches = np.load(settings["batches"])
    share = settings["global_batch"] // world
    mine = slice(rank * share, (rank + 1) * share)
    for step in range(settings["steps"]):
        start = time.perf_counter()
        ids = torch.from_numpy(batches["inputs"][step, mine]).to(device)
        targets = torch.from_numpy(batches["targets"][step, mine]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings["precision"] == "bf16"):
            logits = model(ids)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if rank == 0:
            line = {"step": step + 1, "seconds": time.perf_counter() - start, "loss": value, "at": time.time()}
            print(json.dumps(line), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
