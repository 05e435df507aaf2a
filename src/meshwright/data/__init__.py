"""Data: indexed once, then any batch of any step on any layout. Imports no torch."""

from meshwright.data.batch import Batch
from meshwright.data.bigram import bigram_bits_per_byte
from meshwright.data.manifest import MANIFEST_NAME, Manifest, Survey, build_manifest, check_manifest, survey
from meshwright.data.tokenizer import Tokenizer

__all__ = [
    "MANIFEST_NAME",
    "Batch",
    "Manifest",
    "Survey",
    "Tokenizer",
    "bigram_bits_per_byte",
    "build_manifest",
    "check_manifest",
    "survey",
]
