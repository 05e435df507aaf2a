"""Ranks of a world played by threads: each has its own Writer and its own pieces, and they share only a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from meshwright.checkpoint import ModelFolder, Writer
from meshwright.layout import Box, Layout, coordinates
from meshwright.placement import Placement

Held = dict[str, tuple[Placement, torch.Tensor]]


def held(tensors: Mapping[str, torch.Tensor], pieces: Mapping[str, Placement], *, fill: bool = True) -> Held:
    """Local tensors of `pieces`: copies of the global tensors' boxes, or (not `fill`) something else to be loaded."""
    result = {}
    for name, piece in pieces.items():
        index = tuple(slice(s, s + n) for s, n in zip(piece.box.start, piece.box.shape, strict=True))
        local = tensors[name][index].clone()
        result[name] = (piece, local if fill else torch.full_like(local, 7))
    return result


def world_pieces(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Placement]]:
    """For each rank, the pieces of a made-up sharding: stage by order of names, tp along the last dimension of
    matrices, shards along the first; parts may be empty."""
    world: list[dict[str, Placement]] = []
    for rank in range(layout.devices):
        here = coordinates(layout, rank)
        pieces = {}
        for number, (name, shape) in enumerate(shapes.items()):
            if number * layout.pp // len(shapes) != here.pp:
                continue
            box = Box.whole(shape)
            split_tp = len(shape) >= 2 and layout.tp > 1
            if split_tp:
                box = box.split(len(shape) - 1, layout.tp, here.tp)
            split_shard = len(shape) >= 1 and layout.shard > 1
            if split_shard:
                box = box.split(0, layout.shard, here.shard)
            copies = layout.replicate * (1 if split_tp else layout.tp) * (1 if split_shard else layout.shard)
            owner = here.replicate == 0 and (split_tp or here.tp == 0) and (split_shard or here.shard == 0)
            pieces[name] = Placement(name, box, copies, owner)
        world.append(pieces)
    return world


def whole_pieces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placement]:
    return {name: Placement(name, Box.whole(shape), 1, True) for name, shape in shapes.items()}


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def split_by_part(entries: Held) -> tuple[Held, Held]:
    """(model, state): names that begin with "optimizer." are state."""
    model = {name: entry for name, entry in entries.items() if not name.startswith("optimizer.")}
    return model, {name: entry for name, entry in entries.items() if name not in model}


def in_threads(count: int, work: Callable[[int], None]) -> list[BaseException | None]:
    """Runs work(rank) for each rank at once; returns each one's exception or None."""
    errors: list[BaseException | None] = [None] * count

    def one(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def save_world(
    root: Path,
    step: int,
    world: list[dict[str, Placement]],
    tensors: Mapping[str, torch.Tensor],
    *,
    meta: Mapping[str, Any] | None = None,
    model_files: ModelFolder | None = None,
    layout: Layout | None = None,
    timeout_seconds: float = 60,
    keep: int = 2,
) -> None:
    """All ranks save `tensors` as checkpoint `step`; raises the first rank's error."""
    names = {name: f"hf.{name}" for name in tensors if not name.startswith("optimizer.")}

    def one(rank: int) -> None:
        writer = Writer(root, rank, len(world), layout=layout, timeout_seconds=timeout_seconds, keep=keep)
        model, state = split_by_part(held(tensors, world[rank]))
        writer.save(step, model, state, meta or {}, model_files or ModelFolder(names))
        writer.wait()

    for error in in_threads(len(world), one):
        if error is not None:
            raise error


def example_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A few tensors of the kinds there are: matrices, vectors, a scalar, whole numbers, bf16, one with no rows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "blocks.embed.weight": torch.randn(10, 6, generator=generator),
        "blocks.0.attn.q.weight": torch.randn(6, 6, generator=generator),
        "blocks.0.norm.weight": torch.randn(6, generator=generator).to(torch.bfloat16),
        "blocks.1.conv.weight": torch.randn(3, 2, 5, generator=generator),
        "blocks.1.count": torch.tensor(41 + seed),
        "blocks.1.empty": torch.empty(0, 4),
        "optimizer.exp_avg.blocks.embed.weight": torch.randn(10, 6, generator=generator),
        "optimizer.exp_avg_sq.blocks.0.attn.q.weight": torch.randn(6, 6, generator=generator),
        "optimizer.step": torch.tensor(seed, dtype=torch.int64),
    }


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the manifest with a digest that fits, as an attacker would."""
    path = folder / "manifest.json"
    record = json.loads(path.read_bytes())
    record.pop("sha256")
    change(record)
    rest = json.dumps(record).encode()[1:]
    path.write_bytes(b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest)


def as_version_1(record: dict[str, Any]) -> None:
    """Makes of a manifest's record one of version 1. The tensors must be small: a piece has one tile."""
    record["version"] = 1
    for tensor in record["tensors"].values():
        for piece in tensor["pieces"]:
            assert piece.pop("tile") == piece["shape"], "a large tensor"
            (piece["sha256"],) = piece["sha256"]
