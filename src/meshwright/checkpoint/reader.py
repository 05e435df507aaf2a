"""Loading: fills local tensors of any layout from the pieces that any other layout saved."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshwright.checkpoint.files import map_file
from meshwright.checkpoint.folder import committed_folders
from meshwright.checkpoint.manifest import CheckpointManifest, StoredPiece, StoredTensor, read_manifest
from meshwright.checkpoint.tensors import CODES, DTYPES, LocalTensors, Slot, element_view, from_bytes, slices
from meshwright.errors import InputError, Problem
from meshwright.placement import Placement

DAMAGED = "the file was changed or damaged; use another checkpoint"


def load(folder: Path, tensors: LocalTensors, *, complete: Collection[str] | None = None) -> None:
    """Fills `tensors` (on any device) from the checkpoint `folder`.

    Reads only the pieces that overlap their boxes, and checks the digest of a piece before its bytes are used.

    Raises InputError, naming file and tensor, for a checkpoint that is not committed, was changed, or lacks a tensor,
    or if shape or dtype differ. `complete` has the names of the tensors of all ranks: then the checkpoint may hold no
    others, which nothing would read. It lists all such tensors, and then nothing is filled.
    """
    folder = Path(folder)
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


class CheckedFiles:
    """A checkpoint's files, mapped on first use, when the size and the digest of a file's header are checked."""

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
                raise InputError(Problem(where, "its header does not have the manifest's digest", DAMAGED))
            self._mapped[path] = data
        return self._mapped[path]

    def fill(self, name: str, placement: Placement, local: torch.Tensor) -> None:
        """Copies the box of `placement` of tensor `name` into `local`, cast to its dtype. Reads only the pieces that
        overlap it. Raises InputError for damage, and names the newest older checkpoint that is intact."""
        tensor = self.manifest.tensors[name]
        for piece in tensor.pieces:
            box = piece.box(tensor.global_shape)
            overlap = box.intersect(placement.box)
            if overlap is None:
                continue
            try:
                elements = self.elements(name, tensor, piece)
            except InputError as error:
                older = _intact_before(self.folder, self.manifest.sequence)
                if older is None:
                    raise
                problems = [replace(problem, nearest=f"{older} is intact") for problem in error.problems]
                raise InputError(problems) from error
            part = from_bytes(elements[slices(overlap, box)], tensor.dtype)
            with torch.no_grad():
                local.detach()[slices(overlap, placement.box)].copy_(part)

    def elements(self, name: str, tensor: StoredTensor, piece: StoredPiece) -> np.ndarray:
        """A piece's bytes, shape [*piece.shape, bytes per element]."""
        container = piece.container(tensor.global_shape)
        view = element_view(self.open(piece.file), Slot(tensor.dtype, container.shape, piece.offset))
        elements = view[slices(piece.box(tensor.global_shape), container)]
        # The caller uses the copy that is hashed: the file may change between two reads.
        elements = np.array(elements, order="C", copy=True)
        if hashlib.sha256(elements.reshape(-1).data).hexdigest() != piece.sha256:
            what = f"the bytes of tensor {name!r} (from {list(piece.start)}) do not have the manifest's digest"
            raise InputError(Problem(str(self.folder / piece.file), what, DAMAGED))
        return elements


def _intact_before(folder: Path, sequence: int) -> Path | None:
    """The newest checkpoint beside `folder` that was committed before `sequence` and whose every byte is intact."""
    for older, manifest in reversed(committed_folders(folder.parent)[0]):
        if manifest.sequence < sequence:
            files = CheckedFiles(older, manifest)
            try:
                for name, tensor in manifest.tensors.items():
                    for piece in tensor.pieces:
                        files.elements(name, tensor, piece)
            except InputError:
                continue
            return older
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
