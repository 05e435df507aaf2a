from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.data import bigram_bits_per_byte


def by_hand(train: bytes, held_out: bytes) -> float:
    bits = 8.0
    for last, byte in pairwise(held_out):
        pair = sum(pair == (last, byte) for pair in pairwise(train))
        follows = sum(a == last for a in train[:-1])
        bits -= math.log2((pair + 1) / (follows + 256))
    return bits / len(held_out)


@given(st.binary(max_size=60), st.binary(min_size=1, max_size=60))
def test_agrees_with_counting_by_hand(train: bytes, held_out: bytes) -> None:
    assert bigram_bits_per_byte(train, held_out) == pytest.approx(by_hand(train, held_out), rel=1e-12)


def test_text_that_repeats_is_cheap_and_noise_is_not() -> None:
    assert bigram_bits_per_byte(b"ab" * 10_000, b"ab" * 1000) < 0.1
    assert bigram_bits_per_byte(b"", b"any text") == pytest.approx(8.0)


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out text"):
        bigram_bits_per_byte(b"abc", b"")
