"""Loading: local tensors of any layout, filled from the pieces of whatever layout saved the checkpoint."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshwright.checkpoint.files import map_file
from meshwright.checkpoint.manifest import CheckpointManifest, StoredPiece, StoredTensor, read_manifest
from meshwright.checkpoint.tensors import CODES, DTYPES, Slot, element_view, from_bytes, slices
from meshwright.errors import InputError, Problem
from meshwright.placement import Placement


def load(folder: Path, wanted: Mapping[str, tuple[Placement, torch.Tensor]]) -> None:
    """Fills each local tensor of `wanted` (shape placement.box.shape, any device) from the checkpoint `folder`.

    Only the parts of files that overlap the wanted boxes are read, and the digest of every piece read is checked before
    its bytes are used.

    Raises InputError, naming file and tensor, for a checkpoint that is not committed, was changed, or lacks a tensor,
    or where shape or dtype differ; all such tensors are listed, and nothing is filled then.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = list(_mismatches(folder, manifest, wanted))
    if problems:
        raise InputError(problems)
    files = _Files(folder, manifest)
    for name, (placement, local) in wanted.items():
        tensor = manifest.tensors[name]
        for stored in tensor.pieces:
            box = stored.box(tensor.global_shape)
            overlap = box.intersect(placement.box)
            if overlap is None:
                continue
            elements = files.elements(name, tensor, stored)
            part = from_bytes(elements[slices(overlap, box)], tensor.dtype)
            with torch.no_grad():
                local.detach()[slices(overlap, placement.box)].copy_(part)


class _Files:
    """A checkpoint's files, mapped on first use, the digest of each file's header checked then."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._mapped: dict[str, Any] = {}

    def open(self, path: str) -> Any:
        if path not in self._mapped:
            data = map_file(self.folder / path)
            _check_file(self.folder, path, self.manifest, data)
            self._mapped[path] = data
        return self._mapped[path]

    def elements(self, name: str, tensor: StoredTensor, stored: StoredPiece) -> np.ndarray:
        """A piece's bytes, shape [*stored.shape, bytes of an element]."""
        container = stored.container(tensor.global_shape)
        view = element_view(self.open(stored.file), Slot(tensor.dtype, container.shape, stored.offset))
        elements = view[slices(stored.box(tensor.global_shape), container)]
        # The copy that is hashed is the copy that is used: the file may be changed between two reads.
        elements = np.array(elements, order="C", copy=True)
        if hashlib.sha256(elements.reshape(-1).data).hexdigest() != stored.sha256:
            where = str(self.folder / stored.file)
            what = f"the bytes of tensor {name!r} (from {list(stored.start)}) do not have the manifest's digest"
            raise InputError(Problem(where, what, "the file was changed or damaged; use another checkpoint"))
        return elements


def _check_file(folder: Path, path: str, manifest: CheckpointManifest, data: Any) -> None:
    file = manifest.files[path]
    if len(data) != file.bytes:
        raise InputError(Problem(str(folder / path), f"is {len(data)} bytes, its manifest says {file.bytes}"))
    if hashlib.sha256(memoryview(data)[: file.digested_bytes]).hexdigest() != file.sha256:
        part = "its header does" if file.digested_bytes < file.bytes else "it does"
        raise InputError(
            Problem(
                str(folder / path),
                f"{part} not have the manifest's digest",
                "the file was changed or damaged; use another checkpoint",
            )
        )


def _mismatches(
    folder: Path, manifest: CheckpointManifest, wanted: Mapping[str, tuple[Placement, torch.Tensor]]
) -> Iterable[Problem]:
    for name, (placement, local) in wanted.items():
        if tuple(local.shape) != placement.box.shape:
            raise ValueError(f"{name}: the tensor has shape {tuple(local.shape)}, its piece {placement.box.shape}")
        tensor = manifest.tensors.get(name)
        if tensor is None:
            yield Problem(str(folder), f"has no tensor {name!r}{_close(name, manifest.tensors)}")
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


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f" (nearest: {close[0]!r})" if close else ""
