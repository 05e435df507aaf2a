"""The manifest: the contents of a checkpoint, with sizes and digests. It is written last and read first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.checkpoint.files import FILE_NAME, dump_json
from meshwright.checkpoint.tensors import DTYPES, MAX_BYTES, TENSOR_NAME, Slot, cover_fault, is_shape, tile_count
from meshwright.disk import OWN_DISK, Disk
from meshwright.errors import InputError, Problem
from meshwright.files import has_its_digest, parse_json, with_digest
from meshwright.layout import Box

VERSION = 2
#: Versions that can be read. In version 1 a piece has one digest: the whole piece is one tile. It has no buffers.
VERSIONS = (1, VERSION)
MANIFEST_NAME = "manifest.json"
MANIFEST_CAP_BYTES = 256 << 20
#: The folders of a checkpoint.
PARTS = ("model", "state")

_SEQUENCE = re.compile(rb'"sequence": ?([0-9]{1,15})[,}]')
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredPiece:
    """A box of a tensor as one owner wrote it. `sha256` has the digest of each of its tiles (`tensors.tiles`): of the
    tile's own bytes, row-major.

    `offset` is the byte in `file` where the file's tensor begins: in `model/` the whole tensor, of which the piece is a
    box; in `state/` the piece itself.
    """

    file: str
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    sha256: tuple[str, ...]

    def box(self, global_shape: tuple[int, ...]) -> Box:
        return Box(global_shape, self.start, self.shape)

    def container(self, global_shape: tuple[int, ...]) -> Box:
        """The box of the file's tensor at `offset`."""
        return Box.whole(global_shape) if self.file.startswith("model/") else self.box(global_shape)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model or of the training state; `dtype` in the safetensors word ("F32", "BF16", "I64")."""

    dtype: str
    global_shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True)
class StoredFile:
    """A file's size, and the digest of its first `digested_bytes`.

    These are the header of a safetensors file (each tile has its own digest), and all of any other file.
    """

    bytes: int
    digested_bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """A committed checkpoint. `sequence` counts commits of a run: after a rewind a lower step can be the newer one.

    `parent` is the step of the checkpoint from which training continued (None at the start of a run); `layout` and
    `world` are of the run that saved it, and loading does not depend on them; `meta` is the trainer's own JSON;
    `version` is of the file that was read.
    """

    step: int
    sequence: int
    parent: int | None
    world: int
    layout: Mapping[str, Any]
    meta: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    version: int = VERSION


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    """The bytes of manifest.json."""
    record = {
        **vars(manifest),
        "version": VERSION,
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "global_shape": tensor.global_shape,
                "pieces": [
                    {
                        "file": piece.file,
                        "offset": piece.offset,
                        "start": piece.start,
                        "shape": piece.shape,
                        "tile": piece.tile,
                        "bytes": math.prod(piece.shape) * DTYPES[tensor.dtype].itemsize,
                        "sha256": piece.sha256,
                    }
                    for piece in tensor.pieces
                ],
            }
            for name, tensor in manifest.tensors.items()
        },
        "files": {path: vars(file) for path, file in manifest.files.items()},
    }
    return with_digest(dump_json(record) + b"\n")


def read_manifest(folder: Path, disk: Disk = OWN_DISK) -> CheckpointManifest:
    """The manifest of a checkpoint folder on `disk`, after checking its digest, its schema and the sizes of the files.

    Raises InputError, naming file and tensor, for a folder that is not a committed checkpoint or was changed since.
    """
    folder = Path(folder)
    data = disk.read(folder / MANIFEST_NAME, MANIFEST_CAP_BYTES)
    if data is None:
        raise InputError(
            Problem(
                str(folder),
                f"is not a committed checkpoint: it has no {MANIFEST_NAME}",
                "name a folder checkpoints/step-N of a run",
            )
        )
    manifest = decode_manifest(data, str(folder / MANIFEST_NAME))
    found = {f"{part}/{name}": one for part in PARTS for name, one in disk.entries(folder / part).items()}
    problems = []
    for path, file in manifest.files.items():
        entry, where = found.get(path), str(folder / path)
        if entry is None or entry.is_folder:
            problems.append(Problem(where, "is missing, or is not a regular file"))
        elif entry.bytes != file.bytes:
            problems.append(Problem(where, f"is {entry.bytes} bytes, its manifest says {file.bytes}"))
    if problems:
        raise InputError(problems)
    return manifest


def stated_sequence(folder: Path, disk: Disk = OWN_DISK) -> int | None:
    """The `sequence` in the manifest of a damaged checkpoint, whose digest need not fit; None if none can be read."""
    try:
        data = disk.read(folder / MANIFEST_NAME, MANIFEST_CAP_BYTES)
    except (OSError, InputError):
        data = None
    stated = _SEQUENCE.search(data, 0, 1000) if data else None
    return int(stated.group(1)) if stated else None


def decode_manifest(data: bytes, where: str) -> CheckpointManifest:
    """The manifest in `data`, after checking digest and schema; `where` is its path for messages."""
    intact = has_its_digest(data)
    if intact is None:
        raise InputError(Problem(where, "is not a manifest: its first line has no digest"))
    if not intact:
        raise InputError(
            Problem(where, "its digest does not match: it was cut short or changed", "use an earlier checkpoint")
        )
    record = parse_json(data, where)
    top = _RecordReader(where)
    version = top.get(record, "version", int)
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise InputError(Problem(where, f"is of version {version}", f"this Meshwright reads versions {known}"))
    keys = ("sha256", "version", "step", "sequence", "parent", "world", "layout", "meta", "tensors", "files")
    top.exactly(record, keys)
    parent = None if record["parent"] is None else top.count(record, "parent")
    files = {
        path: _decode_file(path, entry, _RecordReader(f"{where}: files[{path[:200]!r}]"))
        for path, entry in top.get(record, "files", dict).items()
    }
    tensors = {
        name: _decode_tensor(name, entry, version, files, _RecordReader(f"{where}: tensor {name[:200]!r}"))
        for name, entry in top.get(record, "tensors", dict).items()
    }
    return CheckpointManifest(
        step=top.count(record, "step"),
        sequence=top.count(record, "sequence"),
        parent=parent,
        world=top.count(record, "world"),
        layout=top.get(record, "layout", dict),
        meta=top.get(record, "meta", dict),
        tensors=tensors,
        files=files,
        version=version,
    )


class _RecordReader:
    """Typed values of parsed JSON; `where` is in every message."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, what: str) -> InputError:
        return InputError(Problem(self.where, what))

    def get(self, record: Any, key: str, kind: type) -> Any:
        if not isinstance(record, dict) or key not in record:
            raise self.fail(f"has no {key!r}")
        if type(record[key]) is not kind:  # exact: True is not a number here
            raise self.fail(f"{key!r} must be of type {kind.__name__}")
        return record[key]

    def count(self, record: Any, key: str) -> int:
        value: int = self.get(record, key, int)
        if not 0 <= value <= MAX_BYTES:
            raise self.fail(f"{key!r} is out of range")
        return value

    def shape(self, record: Any, key: str) -> tuple[int, ...]:
        value = self.get(record, key, list)
        if not is_shape(value):
            raise self.fail(f"{key!r} must be a list of sizes")
        return tuple(value)

    def digest(self, value: Any) -> str:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.fail("'sha256' must be 64 hexadecimal digits")
        return value

    def exactly(self, record: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(record, dict) or set(record) != set(keys):
            raise self.fail("must have exactly the keys " + ", ".join(keys))


def _decode_file(path: str, entry: Any, reader: _RecordReader) -> StoredFile:
    part, _, name = path.partition("/")
    if part not in PARTS or not FILE_NAME.fullmatch(name):
        raise reader.fail("a path must be model/NAME or state/NAME: no other folder, no '..', no absolute path")
    reader.exactly(entry, ("bytes", "digested_bytes", "sha256"))
    size, digested = reader.count(entry, "bytes"), reader.count(entry, "digested_bytes")
    if digested > size:
        raise reader.fail("'digested_bytes' is more than 'bytes'")
    return StoredFile(size, digested, reader.digest(entry["sha256"]))


def _decode_tensor(
    name: str, entry: Any, version: int, files: Mapping[str, StoredFile], reader: _RecordReader
) -> StoredTensor:
    if not TENSOR_NAME.fullmatch(name):
        raise reader.fail("its name is too long or has control characters")
    reader.exactly(entry, ("dtype", "global_shape", "pieces"))
    dtype = reader.get(entry, "dtype", str)
    if dtype not in DTYPES:
        raise reader.fail("its dtype is not supported (known: " + ", ".join(DTYPES) + ")")
    global_shape = reader.shape(entry, "global_shape")
    pieces = tuple(
        _decode_piece(piece, version, dtype, global_shape, files, reader) for piece in reader.get(entry, "pieces", list)
    )
    fault = cover_fault([piece.box(global_shape) for piece in pieces], global_shape)
    if fault:
        raise reader.fail(fault)
    return StoredTensor(dtype, global_shape, pieces)


def _decode_piece(
    entry: Any,
    version: int,
    dtype: str,
    global_shape: tuple[int, ...],
    files: Mapping[str, StoredFile],
    reader: _RecordReader,
) -> StoredPiece:
    tiled = ("tile",) if version > 1 else ()
    reader.exactly(entry, ("file", "offset", "start", "shape", *tiled, "bytes", "sha256"))
    piece = StoredPiece(
        file=reader.get(entry, "file", str),
        offset=reader.count(entry, "offset"),
        start=reader.shape(entry, "start"),
        shape=reader.shape(entry, "shape"),
        tile=reader.shape(entry, "tile" if tiled else "shape"),
        sha256=tuple(map(reader.digest, reader.get(entry, "sha256", list) if tiled else [entry["sha256"]])),
    )
    if piece.file not in files:
        raise reader.fail(f"a piece names a file that is not listed under 'files': {piece.file[:200]!r}")
    if not len(piece.start) == len(piece.shape) == len(piece.tile) == len(global_shape):
        raise reader.fail("a piece has another number of dimensions than the tensor")
    itemsize = DTYPES[dtype].itemsize
    if reader.count(entry, "bytes") != math.prod(piece.shape) * itemsize:
        raise reader.fail("a piece's 'bytes' do not follow from its shape")
    if len(piece.sha256) != tile_count(piece.shape, piece.tile):
        raise reader.fail("a piece does not have a digest for each of its tiles")
    container = Slot(dtype, piece.container(global_shape).shape, piece.offset)
    if container.offset + container.bytes > files[piece.file].bytes:
        raise reader.fail(f"a piece reaches beyond the end of {piece.file}")
    return piece
