"""Checkpoints: every rank writes the boxes it owns, and any layout reads them; safetensors and JSON only.

Writer              saves, one per rank, in the background; rank 0 commits
latest              the newest committed checkpoint of a run
load                fills local tensors from a checkpoint of any layout and checks their digests
check               checks every digest of a checkpoint; check_side_files only those of the files beside the weights
read_model_folder   fills local tensors from a Hugging Face folder that others wrote
saves               whether tensors of a type can be saved
"""

from meshwright.checkpoint.foreign import read_model_folder
from meshwright.checkpoint.manifest import CheckpointManifest, StoredFile, StoredPiece, StoredTensor, read_manifest
from meshwright.checkpoint.model_folder import ModelFolder
from meshwright.checkpoint.reader import check, check_side_files, latest, load
from meshwright.checkpoint.tensors import saves
from meshwright.checkpoint.writer import Writer

__all__ = [
    "CheckpointManifest",
    "ModelFolder",
    "StoredFile",
    "StoredPiece",
    "StoredTensor",
    "Writer",
    "check",
    "check_side_files",
    "latest",
    "load",
    "read_manifest",
    "read_model_folder",
    "saves",
]
