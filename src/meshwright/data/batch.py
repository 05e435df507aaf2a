"""Samples by index, from mapped files: windows of a token stream, or rows of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

#: Target that is not counted (padding); the same as nn's and torch's.
IGNORED = -100

Batch = dict[str, np.ndarray]


class Samples(Protocol):
    """The samples of one split of a manifest."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Batch:
        """The samples at `indices`; an index from len() on gives padding, whose targets do not count."""
        ...

    def text_bytes(self, indices: np.ndarray) -> int:
        """Bytes of text behind the counted targets of these samples; 0 without text."""
        ...


def window_count(tokens: int, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens that overlap by one in a stream of `tokens`, the last one padded."""
    return max(0, -(-(tokens - 1) // seq_len))


@dataclass(frozen=True)
class TokenWindows:
    """A stream of documents, each ended by `eos`, cut into windows of seq_len + 1 tokens that overlap by one.

    Every token but the stream's first is a target exactly once. The last window is padded. Positions start at 0 in
    each window, and attention may cross the documents in it.

    tokens: [tokens] uint16 or uint32; documents: [documents, 2] uint64, the end of each document in tokens (its end
    token included) and in bytes of text; byte_lengths: [vocab], or None if ids do not determine bytes.
    """

    tokens: np.ndarray
    documents: np.ndarray
    seq_len: int
    eos: int
    byte_lengths: np.ndarray | None

    def __len__(self) -> int:
        return window_count(len(self.tokens), self.seq_len)

    def take(self, indices: np.ndarray) -> Batch:
        """input_ids, positions and targets, each int64 [samples, seq_len]."""
        places = indices[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        inside = places < len(self.tokens)
        window = np.full(places.shape, self.eos, dtype=np.int64)
        window[inside] = self.tokens[places[inside]]
        targets = np.where(inside[:, 1:], window[:, 1:], IGNORED)
        positions = np.broadcast_to(np.arange(self.seq_len), targets.shape).copy()
        return {"input_ids": window[:, :-1].copy(), "positions": positions, "targets": targets}

    def text_bytes(self, indices: np.ndarray) -> int:
        places = (indices[:, None] * self.seq_len + np.arange(1, self.seq_len + 1)).ravel()
        places = places[places < len(self.tokens)]
        if self.byte_lengths is not None:
            return int(self.byte_lengths[self.tokens[places]].sum(dtype=np.int64))
        return int(self._shared_bytes(places).sum())

    def _shared_bytes(self, places: np.ndarray) -> np.ndarray:
        """Bytes at each place where ids do not determine them: a document's bytes, spread evenly over its tokens.

        The sum over a whole document is exact; its end token has no bytes.
        """
        ends = self.documents[:, 0].astype(np.int64)
        begins = np.concatenate(([0], ends[:-1]))
        bytes_ends = self.documents[:, 1].astype(np.int64)
        document_bytes = np.diff(bytes_ends, prepend=0)
        document = np.searchsorted(ends, places, side="right")
        within = places - begins[document]
        length = ends[document] - begins[document] - 1
        total = document_bytes[document]
        divisor = np.maximum(length, 1)
        shared = (within + 1) * total // divisor - within * total // divisor
        return np.where(within < length, shared, 0)


@dataclass(frozen=True)
class Rows:
    """Labelled arrays: inputs float32 [samples, ...] and targets int64 [samples]."""

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> Batch:
        """inputs float32 [samples, ...] and targets int64 [samples]."""
        inside = indices < len(self)
        inputs = np.zeros((len(indices), *self.inputs.shape[1:]), dtype=np.float32)
        inputs[inside] = self.inputs[indices[inside]]
        targets = np.full(len(indices), IGNORED, dtype=np.int64)
        targets[inside] = self.targets[indices[inside]]
        return {"inputs": inputs, "targets": targets}

    def text_bytes(self, indices: np.ndarray) -> int:
        return 0
