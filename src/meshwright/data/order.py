"""The order of samples: a permutation per epoch, computed on demand and never stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6


def batch_samples(
    samples: int,
    seed: int,
    step: int,
    global_batch: int,
    start: int,
    stop: int,
    skips: Sequence[int] = (),
    shift: int = 0,
) -> np.ndarray:
    """Indices (int64 [stop - start]) of the samples at places start..stop of the batch of `step`, counted from 0.

    `shift` is added to every place in the order: what batches of other sizes consumed before, more than as many of this
    size would have. `skips` lists batches that are never trained on, by their number in the order without skips. A
    batch may have the end of one epoch and the start of the next. The result depends on the arguments alone.
    """
    if not 0 <= start <= stop <= global_batch:
        raise ValueError(f"places {start}..{stop} are not in a batch of {global_batch}")
    batch = step
    for skip in sorted(set(skips)):
        batch += skip <= batch
    first = batch * global_batch + shift
    places = np.arange(first + start, first + stop, dtype=np.int64)
    epochs, within = np.divmod(places, samples)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        indices[mine] = permutation(within[mine], samples, seed, int(epoch))
    return indices


def permutation(places: np.ndarray, samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0..samples-1 that (seed, epoch) names, at `places` (int64). Memory and time follow `places`.

    A Feistel network permutes the numbers of the smallest even number of bits that `samples` fits in; a value outside
    the range is permuted again until it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((samples - 1).bit_length() + 1) // 2))
    keys = _mix(np.array([seed % 2**64, epoch], dtype=np.uint64))
    keys = _mix((keys[0] ^ _mix(keys[1:])[0]) + np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= samples]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of 2 x half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64 bits (the finaliser of SplitMix64); arithmetic wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
