"""Loading: fills local tensors of any layout from the pieces that any other layout saved."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshwright.checkpoint.files import map_file
from meshwright.checkpoint.folder import committed_folders, may_be_newer
from meshwright.checkpoint.manifest import MANIFEST_NAME, CheckpointManifest, read_manifest, stated_sequence
from meshwright.checkpoint.tensors import (
    CODES,
    DTYPES,
    LocalTensors,
    Slot,
    digest_of,
    element_view,
    from_bytes,
    slices,
    tiles,
)
from meshwright.disk import OWN_DISK, Disk
from meshwright.errors import InputError, Problem
from meshwright.layout import Box
from meshwright.placement import Placement

log = logging.getLogger(__name__)

DAMAGED = "the file was changed or damaged; use another checkpoint"


def latest(root: Path, disk: Disk = OWN_DISK) -> Path | None:
    """The newest committed checkpoint under `root` (a run's `checkpoints` folder) on `disk`, None if there is none.

    The newest is the last committed, which after a rewind is not the highest step. Folders left by dead writers do not
    count. Raises InputError if a checkpoint that may be newer was changed after its commit: remove its folder to
    continue from the one before, which the error names. A changed older one only gives a warning.
    """
    sound, damaged = committed_folders(Path(root), disk)
    for one in damaged:
        if not sound or may_be_newer(one, *sound[-1], disk):
            with intact_named(one.folder):
                raise one.error
        log.warning("ignored a damaged older checkpoint: %s", one.error)
    return sound[-1][0] if sound else None


def load(folder: Path, tensors: LocalTensors, *, complete: Collection[str] | None = None) -> None:
    """Fills `tensors` (on any device) from the checkpoint `folder`.

    Reads only the tiles of pieces that overlap their boxes, and checks the digest of a tile before its bytes are used.

    Raises InputError, naming file and tensor, for a checkpoint that is not committed, was changed, or lacks a tensor,
    or if shape or dtype differ. `complete` has the names of the tensors of all ranks: then the checkpoint may hold no
    others, which nothing would read. It lists all such tensors, and then nothing is filled.
    """
    folder = Path(folder)
    with intact_named(folder):
        manifest = read_manifest(folder)
    problems = list(_mismatches(folder, manifest, tensors))
    if complete is not None:
        extra = sorted(set(manifest.tensors) - set(complete))
        problems += [Problem(str(folder), f"holds tensor {name!r}, which this model does not have") for name in extra]
    if problems:
        raise InputError(problems)
    files = CheckedFiles(folder, manifest)
    for name, (placement, local) in tensors.items():
        files.fill(name, placement, local)


def check(folder: Path) -> None:
    """Checks every digest of the checkpoint `folder`. Raises InputError as `load`."""
    with intact_named(folder):
        CheckedFiles(folder, read_manifest(folder)).check()


def check_side_files(model: Path) -> None:
    """Checks the digests of the files beside the weights (config.json, the tokenizer's) in `model`, if that is the
    `model/` of a checkpoint. Raises InputError as `load`."""
    files = checkpoint_of(model)
    if files is not None:
        with intact_named(files.folder):
            files.check_side_files()


def checkpoint_of(model: Path) -> CheckedFiles | None:
    """The files of the checkpoint whose `model/` is the folder `model`, None if that is of no checkpoint."""
    model = model.resolve()
    if model.name != "model" or not (model.parent / MANIFEST_NAME).exists():
        return None
    with intact_named(model.parent):
        return CheckedFiles(model.parent, read_manifest(model.parent))


class CheckedFiles:
    """A checkpoint's files, mapped on first use, when the size is checked, and the digest of a weight file's header or
    of all of any other file."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._mapped: dict[str, Any] = {}

    def open(self, path: str) -> Any:
        if path not in self._mapped:
            data = map_file(self.folder / path)
            file, where = self.manifest.files[path], str(self.folder / path)
            if len(data) != file.bytes:
                raise InputError(Problem(where, f"is {len(data)} bytes, its manifest says {file.bytes}"))
            if hashlib.sha256(memoryview(data)[: file.digested_bytes]).hexdigest() != file.sha256:
                subject = "it" if file.digested_bytes == file.bytes else "its header"
                raise InputError(Problem(where, f"{subject} does not have the manifest's digest", DAMAGED))
            self._mapped[path] = data
        return self._mapped[path]

    def fill(self, name: str, placement: Placement, local: torch.Tensor) -> None:
        """Copies the box of `placement` of tensor `name` into `local`, cast to its dtype. Reads only the tiles that
        overlap it. Raises InputError for damage, and names the newest older checkpoint that is intact."""
        dtype = self.manifest.tensors[name].dtype
        with intact_named(self.folder):
            for tile, elements in self.tiles(name, placement.box):
                overlap = tile.intersect(placement.box)
                assert overlap is not None
                with torch.no_grad():
                    part = from_bytes(elements[slices(overlap, tile)], dtype)
                    local.detach()[slices(overlap, placement.box)].copy_(part)

    def tiles(self, name: str, wanted: Box) -> Iterator[tuple[Box, np.ndarray]]:
        """The tiles of a tensor that overlap the box `wanted`, with their bytes, shape [*tile, bytes per element]."""
        tensor = self.manifest.tensors[name]
        for piece in tensor.pieces:
            box, container = piece.box(tensor.global_shape), piece.container(tensor.global_shape)
            if box.intersect(wanted) is None:
                continue
            view = element_view(self.open(piece.file), Slot(tensor.dtype, container.shape, piece.offset))
            for tile, digest in zip(tiles(box, piece.tile), piece.sha256, strict=True):
                if tile.intersect(wanted) is None:
                    continue
                # The caller uses the copy that is hashed: the file may change between two reads.
                elements = np.array(view[slices(tile, container)], order="C", copy=True)
                if digest_of(elements) != digest:
                    what = f"the bytes of tensor {name!r} (from {list(tile.start)}) do not have the manifest's digest"
                    raise InputError(Problem(str(self.folder / piece.file), what, DAMAGED))
                yield tile, elements

    def check(self) -> None:
        """Checks every digest."""
        for path in self.manifest.files:
            self.open(path)
        for name, tensor in self.manifest.tensors.items():
            for _ in self.tiles(name, Box.whole(tensor.global_shape)):
                pass

    def check_side_files(self) -> None:
        """Checks the digests of the files that hold no tensors."""
        for path in self.manifest.files:
            if not path.endswith(".safetensors"):
                self.open(path)


@contextmanager
def intact_named(folder: Path) -> Iterator[None]:
    """Adds the newest older checkpoint that is intact, if there is one, to an error about the checkpoint `folder`."""
    try:
        yield
    except InputError as error:
        intact = _intact_before(folder)
        if intact is None:
            raise
        raise InputError([replace(problem, nearest=f"{intact} is intact") for problem in error.problems]) from error


def _intact_before(folder: Path) -> Path | None:
    """The newest checkpoint beside `folder` that was committed before it and whose every byte is intact; any other one
    where its manifest no longer says when that was."""
    sequence = stated_sequence(folder)
    for other, manifest in reversed(committed_folders(folder.parent)[0]):
        if other != folder and (sequence is None or manifest.sequence < sequence):
            try:
                CheckedFiles(other, manifest).check()
            except InputError:
                continue
            return other
    return None


def _mismatches(folder: Path, manifest: CheckpointManifest, tensors: LocalTensors) -> Iterable[Problem]:
    for name, (placement, local) in tensors.items():
        if tuple(local.shape) != placement.box.shape:
            raise ValueError(f"{name}: the tensor has shape {tuple(local.shape)}, its piece {placement.box.shape}")
        tensor = manifest.tensors.get(name)
        if tensor is None:
            close = difflib.get_close_matches(name, list(manifest.tensors), n=1, cutoff=0.8)
            yield Problem(str(folder), f"has no tensor {name!r}" + (f" (nearest: {close[0]!r})" if close else ""))
            continue
        if tensor.global_shape != placement.box.global_shape:
            yield Problem(
                str(folder),
                f"tensor {name!r} has shape {list(tensor.global_shape)}, wanted {list(placement.box.global_shape)}",
            )
        if DTYPES[tensor.dtype] != local.dtype:
            yield Problem(
                str(folder), f"tensor {name!r} is {tensor.dtype}, wanted {CODES.get(local.dtype, local.dtype)}"
            )
