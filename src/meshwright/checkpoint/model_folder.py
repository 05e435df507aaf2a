"""The `model/` part of a checkpoint: the names of its files, and the position of each tensor in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshwright.checkpoint.files import FILE_NAME, dump_json
from meshwright.checkpoint.tensors import DTYPES, Slot, build_header

#: Suffixes of files that hold code or pickles; a checkpoint has none.
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".py")
MAX_SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True)
class ModelFolder:
    """How the model is written: `names` maps each tensor's name in the module to its name in the file.

    `names` leaves out aliases of tied weights. `side_files` are written beside the weights (config.json,
    tokenizer.json, module.json ...). Weights above `max_shard_bytes` go into several files with an index, as
    `transformers` expects.
    """

    names: Mapping[str, str]
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if len(set(self.names.values())) != len(self.names):
            raise ValueError("two tensors of the model have the same name in the file")
        for name in self.side_files:
            reserved = name.endswith((".safetensors", ".safetensors.index.json", *UNSAFE_SUFFIXES))
            if not FILE_NAME.fullmatch(name) or reserved:
                raise ValueError(f"{name!r} is not a name for a file beside the weights")


@dataclass(frozen=True)
class WeightFile:
    """Header and size of a safetensors file, before the owners write their tensors."""

    header: bytes
    total_bytes: int


def plan_files(
    folder: ModelFolder, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[dict[str, WeightFile], dict[str, tuple[str, Slot]], bytes | None]:
    """Distributes the model's tensors ({name: (dtype word, global shape)}) over files.

    Returns the files by path ("model/..."), each tensor's (path, Slot) by its name in the module, and the index file's
    bytes if there are several files.
    """
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name in folder.names:
        size = Slot(*tensors[name], 0).bytes
        if shards[-1] and shard_bytes + size > folder.max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    files: dict[str, WeightFile] = {}
    places: dict[str, tuple[str, Slot]] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, slots, total_bytes = build_header((folder.names[name], *tensors[name]) for name in names)
        files[f"model/{file}"] = WeightFile(header, total_bytes)
        places |= {name: (f"model/{file}", slots[folder.names[name]]) for name in names}
    if len(shards) == 1:
        return files, places, None
    weight_map = {folder.names[name]: Path(path).name for name, (path, _) in places.items()}
    total_size = sum(slot.bytes for _, slot in places.values())
    parameters = sum(slot.bytes // DTYPES[slot.dtype].itemsize for _, slot in places.values())
    metadata = {"total_parameters": parameters, "total_size": total_size}
    return files, places, dump_json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
