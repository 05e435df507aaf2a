"""Reads a Hugging Face folder, whoever wrote it: safetensors only, nothing in it is trusted or run.

Where it is the `model/` of a checkpoint of ours, the checkpoint's manifest lies beside it, and its digests are checked.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshwright.checkpoint.files import FILE_NAME, map_file
from meshwright.checkpoint.model_folder import UNSAFE_SUFFIXES
from meshwright.checkpoint.reader import DAMAGED, CheckedFiles, check_side_files, checkpoint_of
from meshwright.checkpoint.tensors import (
    DTYPES,
    LocalTensors,
    Slot,
    element_view,
    from_bytes,
    parse_header,
    slices,
    tile_of,
    tiles,
)
from meshwright.errors import InputError, Problem
from meshwright.files import parse_json, read_capped
from meshwright.layout import Box

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_CAP_BYTES = 64 << 20
MAX_SHARDS = 10_000

#: Every tensor of a folder by its name in the file: file, slot, mapped bytes.
Stored = Mapping[str, tuple[str, Slot, Any]]


def read_model_folder(
    folder: Path,
    names: Mapping[str, str],
    tensors: LocalTensors,
    *,
    ignored: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
) -> None:
    """Fills `tensors` (by our names) from a Hugging Face folder. `names` maps our names of all tensors to the file's.

    The folder has `model.safetensors`, or shards with `model.safetensors.index.json`, not both. Floating-point tensors
    are cast to the dtype of the local tensor. `ignored` has patterns (`*.inv_freq`) of tensors that the file may have
    and we do not need. `names` leaves out aliases of tied weights; `tied` has their names in the file, and those of the
    weights.
    Links are followed: the Hugging Face cache is made of them.

    For `step-N/model` of a checkpoint, the digests of all that is read and of the files beside the weights are checked
    against the manifest.

    Raises InputError, naming file and tensor, for a folder without safetensors, a malformed file, and tensors that are
    missing, unknown, or of another shape or kind, or a stored alias that is not equal to its weight; then nothing is
    filled. Raises it for damage, too.
    """
    folder, tied = Path(folder), tied or {}
    check_side_files(folder)
    stored = _open_folder(folder)
    problems = []
    for name, file_name in names.items():
        if file_name not in stored:
            problems.append(Problem(str(folder), f"has no tensor {file_name!r} (our {name!r})"))
    for file_name, (file, _, _) in stored.items():
        if file_name not in {*names.values(), *tied} and not any(fnmatch.fnmatchcase(file_name, p) for p in ignored):
            problems.append(Problem(str(folder / file), f"holds tensor {file_name!r}, which this model does not have"))
    for name, (placement, local) in tensors.items():
        if tuple(local.shape) != placement.box.shape:
            raise ValueError(f"{name}: the tensor has shape {tuple(local.shape)}, its piece {placement.box.shape}")
        file, slot, _ = stored.get(names[name], ("", None, None))
        if slot is None:
            continue
        if slot.shape != placement.box.global_shape:
            what = f"tensor {names[name]!r} has shape {list(slot.shape)}, wanted {list(placement.box.global_shape)}"
            problems.append(Problem(str(folder / file), what))
        elif DTYPES[slot.dtype] != local.dtype and not (
            DTYPES[slot.dtype].is_floating_point and local.is_floating_point()
        ):
            what = f"tensor {names[name]!r} is {slot.dtype}, which does not turn into {local.dtype}"
            problems.append(Problem(str(folder / file), what))
    problems = problems or _untied(folder, stored, names, tensors, tied)
    if problems:
        raise InputError(problems)
    files = checkpoint_of(folder)
    if files is not None:
        return _fill_checked(files, stored, names, tensors)
    for name, (placement, local) in tensors.items():
        _, slot, data = stored[names[name]]
        part = element_view(data, slot)[slices(placement.box, Box.whole(slot.shape))]
        with torch.no_grad():
            local.detach().copy_(from_bytes(part, slot.dtype))


def _untied(
    folder: Path, stored: Stored, names: Mapping[str, str], tensors: LocalTensors, tied: Mapping[str, str]
) -> list[Problem]:
    """Aliases in the file that differ from their weight where this rank has a part of it."""
    boxes = {names[name]: placement.box for name, (placement, _) in tensors.items()}
    problems = []
    for alias, name in tied.items():
        if alias in stored and name in boxes and not _equal(stored[alias], stored[name], boxes[name]):
            what = f"tensor {alias!r} is not equal to {name!r}, which the config says it is (tie_word_embeddings)"
            hint = 'set "tie_word_embeddings" to false in config.json to use both'
            problems.append(Problem(str(folder / stored[alias][0]), what, hint))
    return problems


def _equal(one: tuple[str, Slot, Any], other: tuple[str, Slot, Any], box: Box) -> bool:
    """Whether two stored tensors are equal in `box`; of two dtypes, rounded to the first one's.

    A first one of whole numbers is compared in fp64, so that the other is not rounded to whole numbers.
    """
    (_, slot, data), (_, other_slot, other_data) = one, other
    if slot.shape != other_slot.shape:
        return False
    whole = Box.whole(slot.shape)
    first = DTYPES[slot.dtype]
    common = first if first.is_floating_point else torch.float64
    for tile in tiles(box, tile_of(box.shape, DTYPES[slot.dtype].itemsize)):
        mine = element_view(data, slot)[slices(tile, whole)]
        theirs = element_view(other_data, other_slot)[slices(tile, whole)]
        if slot.dtype == other_slot.dtype:
            equal = np.array_equal(mine, theirs)
        else:
            values = [from_bytes(one, kind) for one, kind in ((mine, slot.dtype), (theirs, other_slot.dtype))]
            equal = torch.equal(*(one.to(common) for one in values))
        if not equal:
            return False
    return True


def _fill_checked(files: CheckedFiles, stored: Stored, names: Mapping[str, str], tensors: LocalTensors) -> None:
    """Fills `tensors` from a checkpoint's pieces. Its manifest has names of modules, so a tensor is found by place."""
    at = {(piece.file, piece.offset): name for name, one in files.manifest.tensors.items() for piece in one.pieces}
    for name, (placement, local) in tensors.items():
        file, slot, _ = stored[names[name]]
        if slot.bytes == 0:
            continue
        if (f"model/{file}", slot.offset) not in at:
            what = f"tensor {names[name]!r} is not where the manifest has one"
            raise InputError(Problem(str(files.folder / "model" / file), what, DAMAGED))
        files.fill(at[f"model/{file}", slot.offset], placement, local)


def _open_folder(folder: Path) -> dict[str, tuple[str, Slot, Any]]:
    """Every tensor of the folder by its name in the file: (file, slot, mapped bytes)."""
    if not folder.is_dir():
        raise InputError(Problem(str(folder), "is not a folder"))
    index = folder / INDEX
    if index.exists():
        weight_map = _read_index(index)
        others = sorted(set(weight_map.values()) - {SINGLE})
        if others and (folder / SINGLE).exists():  # `transformers` reads the single file
            what = f"has its weights twice: {SINGLE}, and {INDEX} with {others[0]}"
            raise InputError(Problem(str(folder), what, f"remove {SINGLE}, or {INDEX} and its files"))
    elif (folder / SINGLE).exists():
        weight_map = None
    else:
        raise InputError(_no_safetensors(folder))
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    stored: dict[str, tuple[str, Slot, Any]] = {}
    for file in files:
        data = map_file(folder / file, follow_links=True)
        for name, slot in parse_header(data, str(folder / file)).items():
            if weight_map is not None and weight_map.get(name) != file:
                raise InputError(Problem(str(folder / file), f"holds tensor {name!r}, which {INDEX} puts elsewhere"))
            stored[name] = (file, slot, data)
    for name in sorted(set(weight_map or ()) - set(stored)):
        raise InputError(Problem(str(index), f"names tensor {name!r}, which its file does not hold"))
    return stored


def _read_index(path: Path) -> dict[str, str]:
    record = parse_json(read_capped(path, INDEX_CAP_BYTES, follow_links=True), str(path))
    weight_map = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(weight_map, dict):
        raise InputError(Problem(str(path), "has no object 'weight_map'"))
    for name, file in weight_map.items():
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file) or not file.endswith(".safetensors"):
            raise InputError(
                Problem(str(path), f"puts tensor {name[:200]!r} in something that is not a .safetensors file beside it")
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise InputError(Problem(str(path), f"names more than {MAX_SHARDS} files"))
    return weight_map


def _no_safetensors(folder: Path) -> Problem:
    unsafe = sorted(p.name for p in folder.iterdir() if p.suffix in UNSAFE_SUFFIXES and p.suffix != ".py")
    if unsafe:
        return Problem(
            str(folder),
            f"has its weights as {unsafe[0]}, a format that can run code when it is read; safetensors is needed",
            "convert it where you trust it: transformers' save_pretrained writes safetensors",
        )
    return Problem(str(folder), f"has no weights: neither {SINGLE} nor {INDEX}", "name a folder that holds safetensors")
