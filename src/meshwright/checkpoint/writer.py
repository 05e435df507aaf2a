"""Saving: each rank copies the boxes it owns to the host and writes them in the background; rank 0 commits."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meshwright.checkpoint.files import dump_json
from meshwright.checkpoint.folder import clear_leftovers, commit_folder, committed_folders, prune, step_folder
from meshwright.checkpoint.manifest import (
    MANIFEST_NAME,
    PARTS,
    CheckpointManifest,
    StoredFile,
    StoredPiece,
    StoredTensor,
    encode_manifest,
)
from meshwright.checkpoint.model_folder import ModelFolder, plan_files
from meshwright.checkpoint.rendezvous import Rendezvous
from meshwright.checkpoint.tensors import (
    CODES,
    DTYPES,
    LocalTensors,
    build_header,
    cover_fault,
    digest_of,
    runs,
    slices,
    tile_of,
    tiles,
    to_bytes,
)
from meshwright.disk import OWN_DISK, Disk, Piece
from meshwright.errors import MeshwrightError, Problem, RunFailed
from meshwright.files import named_in_errors
from meshwright.layout import Box, Layout
from meshwright.placement import Placement

log = logging.getLogger(__name__)

#: Where checkpoints are prepared when no lease is given.
OWN_LEASE = ".saving-0"


@dataclass(frozen=True)
class _HostBox:
    """A box that this rank owns, as host bytes that only the save uses. `bytes` is flat and may be empty."""

    box: Box
    dtype: str
    bytes: np.ndarray


@dataclass(frozen=True)
class _Save:
    """What the background thread needs from one call of `save`."""

    step: int
    parent: int | None
    model: Mapping[str, _HostBox]
    state: Mapping[str, _HostBox]
    meta: Mapping[str, Any]
    model_files: ModelFolder


class Writer:
    """Saves checkpoints under `root` on `disk`. Every rank of the world has a Writer, and all call `save` for the same
    steps.

    The ranks share only the disk, which each may reach in another way: nothing is gathered, and no collective runs. The
    newest `keep` committed checkpoints stay. `parent` is the step that this run was resumed from. Checkpoints are
    prepared in the folder `lease`; once it has been taken away, none is committed (default: one of this machine's own
    disk that nobody takes away). A missing rank fails the save after `timeout_seconds`. With `asynchronous=False`,
    `save` returns once the checkpoint is committed. Rank 0 calls `committed(step, seconds)` after each commit, with how
    long `save` kept its caller.
    """

    def __init__(
        self,
        root: Path,
        rank: int,
        world: int,
        *,
        asynchronous: bool = True,
        keep: int = 2,
        layout: Layout | None = None,
        parent: int | None = None,
        lease: Path | None = None,
        disk: Disk = OWN_DISK,
        timeout_seconds: float = 600.0,
        committed: Callable[[int, float], None] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside a world of {world}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.root, self.rank, self.world = Path(root), rank, world
        self.asynchronous, self.keep, self.timeout_seconds = asynchronous, keep, timeout_seconds
        self.layout = layout.as_dict() if layout else {}
        self._parent, self._committed, self._disk = parent, committed, disk
        self._lease, self._owns_lease = lease or self.root / OWN_LEASE, lease is None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, step: int, model: LocalTensors, state: LocalTensors, meta: Mapping[str, Any], model_files: ModelFolder
    ) -> None:
        """Saves `model` (into the Hugging Face folder `model/`) and `state` (into `state/`) as checkpoint `step`.

        A rank writes only the boxes it owns; each element of a tensor must have exactly one owner in the world. The
        names of `model` are those of `model_files.names`, and differ from those of `state`. `meta` is JSON. Only rank
        0's `meta` and `model_files` are written.

        Returns once the values are copied; the tensors may then change. Waits first for the previous save and raises
        its error: RunFailed naming rank and step.
        """
        begin = time.perf_counter()
        self.wait()
        if both := set(model) & set(state):
            raise ValueError(f"in the model and in the state: {sorted(both)[0]!r}")
        dump_json(meta)  # a value that is not JSON is the caller's mistake: raise here, not in the background
        staged = {
            part: {name: self._stage(f"{part}/{name}", *entry) for name, entry in pieces.items() if entry[0].owner}
            for part, pieces in (("model", model), ("state", state))
        }
        if any(tensor.is_cuda for pieces in (model, state) for _, tensor in pieces.values()):
            torch.cuda.synchronize()
        save = _Save(step, self._parent, staged["model"], staged["state"], dict(meta), model_files)
        self._parent = step
        staged_seconds = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._run, args=(save, begin, staged_seconds), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save, if any, is committed; raises its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _stage(self, key: str, placement: Placement, tensor: torch.Tensor) -> _HostBox:
        if tuple(tensor.shape) != placement.box.shape:
            raise ValueError(f"{key}: the tensor has shape {tuple(tensor.shape)}, its piece {placement.box.shape}")
        if tensor.dtype not in CODES:
            raise ValueError(f"{key}: {tensor.dtype} cannot be saved as safetensors")
        source = tensor.detach()
        if self.asynchronous or source.is_cuda:
            # Allocating memory (pinned memory even more) costs more than the copy: buffers are kept between saves.
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[key] = buffer
            buffer.copy_(source, non_blocking=True)
        else:
            buffer = source.contiguous()
        return _HostBox(placement.box, CODES[tensor.dtype], to_bytes(buffer))

    def _run(self, save: _Save, begin: float, staged_seconds: float) -> None:
        """The background thread: reports an error to the other ranks and keeps it for the next call."""
        try:
            if self._owns_lease:
                self._lease.mkdir(parents=True, exist_ok=True)
            rendezvous = Rendezvous(self._lease, save.step, self.rank, self.world, self.timeout_seconds, self._disk)
            try:
                with named_in_errors(step_folder(self.root, save.step)):
                    _write(save, self.root, rendezvous, self.keep, self.layout)
            except Exception as error:
                self._refuse_without_lease(save.step)
                _give_up(rendezvous, error)
                raise
            if self.rank == 0 and self._committed is not None:
                seconds = staged_seconds if self.asynchronous else time.perf_counter() - begin
                self._committed(save.step, seconds)
        except MeshwrightError as error:
            self._error = error
        except Exception as error:
            log.debug("checkpoint of step %d failed", save.step, exc_info=True)
            failed = RunFailed(Problem(f"rank {self.rank}, saving step {save.step}", _words(error)))
            failed.__cause__ = error
            self._error = failed

    def _refuse_without_lease(self, step: int) -> None:
        """Raises RunFailed where this generation of ranks is over."""
        if self._disk.entry(self._lease) is None:
            what = "is not committed: other ranks train this run now"
            raise RunFailed(Problem(f"rank {self.rank}, step {step}", what))


def _give_up(rendezvous: Rendezvous, error: Exception) -> None:
    """Frees the disk of a save that failed, and tells the others. Raises RunFailed where rank 0 had failed before."""
    if not rendezvous.nonce:
        return
    disk, partial = rendezvous.disk, rendezvous.partial
    for part in PARTS:
        for name in disk.entries(partial / part):
            if name.endswith(".safetensors"):  # emptied, for others may be about to open them
                with contextlib.suppress(OSError):  # rank 0 may delete the folder meanwhile
                    disk.resize(partial / part / name, 0)
    _tell_others(rendezvous, error)
    if rendezvous.rank == 0:
        with contextlib.suppress(OSError):
            disk.remove(partial)
        return
    try:
        rendezvous.raise_if_failed()
    except RunFailed:  # rank 0 removes the folder, which may fail where this rank made a file meanwhile
        with contextlib.suppress(OSError):
            disk.remove(partial)
        raise


def _tell_others(rendezvous: Rendezvous, error: Exception) -> None:
    """Reports this rank's error to the others, so that they do not wait for the timeout."""
    try:
        if rendezvous.rank == 0 and rendezvous.nonce:
            rendezvous.end(error=_words(error))
        elif rendezvous.nonce and rendezvous.disk.entry(rendezvous.partial) is not None:
            rendezvous.report({"error": _words(error)})
    except OSError as second:  # a full disk has no room for this file either
        log.warning("rank %d could not tell the others that its save failed: %s", rendezvous.rank, second)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, MeshwrightError | OSError) else f"{type(error).__name__}: {error}"


def _write(save: _Save, root: Path, rendezvous: Rendezvous, keep: int, layout: Mapping[str, Any]) -> None:
    """One rank's part of a save, from the first message to the commit."""
    tensors = {name: [staged.dtype, list(staged.box.global_shape)] for name, staged in save.model.items()}
    files: dict[str, StoredFile] = {}
    if rendezvous.rank == 0:
        clear_leftovers(root, rendezvous.lease, rendezvous.disk)
        rendezvous.begin()
        rendezvous.say_hello(tensors)
        places, files = _prepare_model(save, rendezvous)
        rendezvous.publish_plan(places)
    else:
        places = rendezvous.await_plan(tensors)
    pieces = _write_model(save, rendezvous, places)
    state_pieces, state_files = _write_state(save, rendezvous)
    record = {
        name: vars(piece) | {"dtype": staged.dtype, "global_shape": list(staged.box.global_shape)}
        for name, (piece, staged) in (pieces | state_pieces).items()
    }
    rendezvous.report({"pieces": record, "files": {path: vars(file) for path, file in state_files.items()}})
    if rendezvous.rank == 0:
        parts = rendezvous.gather_parts()
        _commit(save, root, rendezvous, parts, files, layout)
        prune(root, keep, rendezvous.nonce, rendezvous.disk)
        rendezvous.end()
    else:
        rendezvous.await_end()


def _prepare_model(save: _Save, rendezvous: Rendezvous) -> tuple[dict[str, Any], dict[str, StoredFile]]:
    """Rank 0: writes the model's files at their full size with headers only, and the files beside them."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, hello in enumerate(rendezvous.gather_hellos()):
        for name, (dtype, shape) in hello.items():
            if shapes.setdefault(name, (dtype, tuple(shape))) != (dtype, tuple(shape)):
                raise RunFailed(Problem(f"rank {rank}, step {save.step}", f"{name} has another shape or dtype there"))
    if unpaired := set(shapes) ^ set(save.model_files.names):
        name = sorted(unpaired)[0]
        what = "has no name in the model folder" if name in shapes else "is owned by no rank"
        raise RunFailed(Problem(f"saving step {save.step}", f"tensor {name} of the model {what}"))
    planned, places, index = plan_files(save.model_files, shapes)
    files = {}
    for path, weight_file in planned.items():
        rendezvous.disk.write(rendezvous.partial / path, weight_file.header, durable=False)
        rendezvous.disk.resize(rendezvous.partial / path, weight_file.total_bytes)
        files[path] = _stored_file(weight_file.header, weight_file.total_bytes)
    beside = dict(save.model_files.side_files)
    if index is not None:
        beside["model.safetensors.index.json"] = index
    for name, data in beside.items():
        rendezvous.disk.write(rendezvous.partial / "model" / name, data)
        files[f"model/{name}"] = _stored_file(data, len(data))
    return {name: [path, slot.offset] for name, (path, slot) in places.items()}, files


def _write_model(
    save: _Save, rendezvous: Rendezvous, places: Mapping[str, Any]
) -> dict[str, tuple[StoredPiece, _HostBox]]:
    """Writes this rank's boxes of the model at their places in the shared files."""
    by_file: dict[str, list[tuple[int, _HostBox]]] = {}
    pieces = {}
    for name, staged in save.model.items():
        path, offset = places[name]
        by_file.setdefault(path, []).append((offset, staged))
        pieces[name] = (_stored_piece(path, offset, staged), staged)
    for path, boxes in by_file.items():
        placed = (piece for offset, staged in boxes for piece in _placed(staged, offset))
        rendezvous.disk.write_at(rendezvous.partial / path, placed)
    return pieces


def _placed(staged: _HostBox, offset: int) -> Iterator[Piece]:
    """The runs of a box at their places in a file whose tensor begins at `offset`."""
    data, whole = staged.bytes.data, Box.whole(staged.box.global_shape)
    for source, target, size in runs(staged.box, whole, DTYPES[staged.dtype].itemsize):
        yield offset + target, data[source : source + size]


def _write_state(
    save: _Save, rendezvous: Rendezvous
) -> tuple[dict[str, tuple[StoredPiece, _HostBox]], dict[str, StoredFile]]:
    """Writes this rank's boxes of the training state into its own file, if it owns any."""
    if not save.state:
        return {}, {}
    path = f"state/rank-{rendezvous.rank}.safetensors"
    header, slots, total_bytes = build_header((n, staged.dtype, staged.box.shape) for n, staged in save.state.items())
    placed = ((slots[name].offset, staged.bytes.data) for name, staged in save.state.items())
    rendezvous.disk.write(rendezvous.partial / path, header, durable=False)
    rendezvous.disk.write_at(rendezvous.partial / path, placed)
    pieces = {name: (_stored_piece(path, slots[name].offset, staged), staged) for name, staged in save.state.items()}
    return pieces, {path: _stored_file(header, total_bytes)}


def _commit(
    save: _Save,
    root: Path,
    rendezvous: Rendezvous,
    parts: list[Any],
    files: dict[str, StoredFile],
    layout: Mapping[str, Any],
) -> None:
    """Rank 0: joins the parts into the manifest, writes it last and renames the folder."""
    tensors: dict[str, tuple[str, tuple[int, ...], list[StoredPiece]]] = {}
    for rank, part in enumerate(parts):
        files |= {path: StoredFile(**file) for path, file in part["files"].items()}
        for name, record in part["pieces"].items():
            dtype, global_shape = record.pop("dtype"), tuple(record.pop("global_shape"))
            lists = {key: tuple(record[key]) for key in ("start", "shape", "tile", "sha256")}
            piece = StoredPiece(**record | lists)
            tensor = tensors.setdefault(name, (dtype, global_shape, []))
            if tensor[:2] != (dtype, global_shape):
                raise RunFailed(Problem(f"rank {rank}, step {save.step}", f"{name} has another shape or dtype there"))
            if 0 not in piece.shape:
                tensor[2].append(piece)
    for name, (_, global_shape, pieces) in tensors.items():
        fault = cover_fault([piece.box(global_shape) for piece in pieces], global_shape)
        if fault:
            raise RunFailed(Problem(f"saving step {save.step}", f"tensor {name}: {fault}"))
    sound, damaged = committed_folders(root, rendezvous.disk)
    earlier = [*(manifest.sequence for _, manifest in sound), *(one.sequence for one in damaged)]
    sequence = max((number for number in earlier if number is not None), default=-1) + 1
    manifest = CheckpointManifest(
        step=save.step,
        sequence=sequence,
        parent=save.parent,
        world=rendezvous.world,
        layout=layout,
        meta=save.meta,
        tensors={name: StoredTensor(dtype, shape, tuple(pieces)) for name, (dtype, shape, pieces) in tensors.items()},
        files=files,
    )
    for part in PARTS:
        rendezvous.disk.sync(rendezvous.partial / part)
    rendezvous.disk.write(rendezvous.partial / MANIFEST_NAME, encode_manifest(manifest))
    commit_folder(root, rendezvous.lease, save.step, rendezvous.nonce, rendezvous.disk)


def _stored_file(digested: bytes, total_bytes: int) -> StoredFile:
    return StoredFile(total_bytes, len(digested), hashlib.sha256(digested).hexdigest())


def _stored_piece(path: str, offset: int, staged: _HostBox) -> StoredPiece:
    box, itemsize = staged.box, DTYPES[staged.dtype].itemsize
    tile = tile_of(box.shape, itemsize)
    elements = staged.bytes.reshape(*box.shape, itemsize)
    digests = tuple(digest_of(elements[slices(part, box)]) for part in tiles(box, tile))
    return StoredPiece(path, offset, box.start, box.shape, tile, digests)
