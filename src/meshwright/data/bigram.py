"""A bigram model of bytes: the baseline that a language model must beat by far."""

from __future__ import annotations

import numpy as np


def bigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Bits per byte of `held_out` under the byte pairs counted in `train`, one added to every count.

    The mean of -log2((count(a, b) + 1) / (count(a) + 256)); the first byte costs 8 bits.
    Raises ValueError if `held_out` is empty.
    """
    if not held_out:
        raise ValueError("there is no held-out text")
    counts = _pairs(train) + 1.0
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return float((8.0 + (bits * _pairs(held_out)).sum()) / len(held_out))


def _pairs(text: bytes) -> np.ndarray:
    """How often byte b follows byte a: int64 [256, 256]."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    return np.bincount(codes[:-1] * np.uint16(256) + codes[1:], minlength=2**16).reshape(256, 256)
