"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, ten classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from meshwright.errors import InputError, Problem

CLASSES = 10


@dataclass(frozen=True)
class Images:
    """inputs: float32 [images, 8, 8] in 0..1; targets: int64 [images] in 0..9; held_out: bool [images]."""

    inputs: np.ndarray
    targets: np.ndarray
    held_out: np.ndarray
    duplicates: int


def load(held_out: float) -> Images:
    """All images, the fraction `held_out` marked as held out by hash, so that equal images stay together.

    Raises InputError naming the extra to install if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        near = "pip install 'meshwright[images]'"
        raise InputError(Problem("data.source", '"digits" needs scikit-learn', near)) from error
    pixels, targets = load_digits(return_X_y=True)
    hashes = np.array([_hash(row) for row in pixels])
    return Images(
        inputs=(pixels / 16.0).astype(np.float32).reshape(-1, 8, 8),
        targets=targets.astype(np.int64),
        held_out=hashes < held_out * 2.0**64,
        duplicates=len(hashes) - len(set(hashes.tolist())),
    )


def _hash(pixels: np.ndarray) -> int:
    digest = hashlib.blake2b(pixels.astype(np.uint8).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
