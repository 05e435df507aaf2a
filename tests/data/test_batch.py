from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.data.batch import IGNORED, Rows, TokenWindows

EOS = 9
lengths = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def stream(document_lengths: list[int], seq_len: int, byte_lengths: np.ndarray | None) -> TokenWindows:
    """Documents of tokens 0..8, each token standing for two bytes of text more than its id."""
    tokens: list[int] = []
    ends, size = [], 0
    for length in document_lengths:
        ids = [(len(tokens) + place) % 9 for place in range(length)]
        tokens += [*ids, EOS]
        size += sum(index + 2 for index in ids)
        ends.append((len(tokens), size))
    documents = np.array(ends, dtype=np.uint64)
    return TokenWindows(np.array(tokens, dtype=np.uint16), documents, seq_len, EOS, byte_lengths)


TABLE = np.array([*range(2, 11), 0], dtype=np.uint16)


@given(lengths, st.integers(1, 10))
def test_every_token_but_the_first_is_a_target_once(document_lengths: list[int], seq_len: int) -> None:
    windows = stream(document_lengths, seq_len, TABLE)
    batch = windows.take(np.arange(len(windows)))
    targets = batch["targets"]
    assert targets[targets != IGNORED].tolist() == windows.tokens[1:].tolist()
    assert batch["input_ids"].shape == batch["positions"].shape == targets.shape == (len(windows), seq_len)
    counted = targets != IGNORED
    assert batch["input_ids"][counted].tolist() == windows.tokens[:-1].tolist()
    assert (batch["positions"] == np.arange(seq_len)).all()
    assert all(batch[name].dtype == np.int64 for name in batch)
    if len(windows):
        assert counted[:-1].all() and counted[-1].any()  # padding is at the tail of the last sample alone


@given(lengths, st.integers(1, 10))
def test_bytes_of_all_targets_are_the_bytes_of_the_text(document_lengths: list[int], seq_len: int) -> None:
    exact, spread = stream(document_lengths, seq_len, TABLE), stream(document_lengths, seq_len, None)
    whole = np.arange(len(exact))
    first = int(TABLE[exact.tokens[0]])  # never a target
    assert exact.text_bytes(whole) == int(exact.documents[-1, 1]) - first
    first_spread = int(spread._shared_bytes(np.array([0]))[0])
    assert spread.text_bytes(whole) == int(spread.documents[-1, 1]) - first_spread
    for windows in (exact, spread):
        assert sum(windows.text_bytes(np.array([index])) for index in whole) == windows.text_bytes(whole)


def test_past_the_end_is_padding() -> None:
    windows = stream([5, 5], 4, TABLE)
    batch = windows.take(np.array([len(windows), len(windows) + 7]))
    assert (batch["targets"] == IGNORED).all() and (batch["input_ids"] == EOS).all()
    assert windows.text_bytes(np.array([len(windows)])) == 0


def test_a_stream_of_one_token_has_no_sample() -> None:
    assert len(stream([0], 4, TABLE)) == 0


def test_rows_come_by_index_and_padding_does_not_count() -> None:
    rows = Rows(np.arange(12, dtype=np.float32).reshape(3, 2, 2), np.array([5, 6, 7]))
    batch = rows.take(np.array([2, 0, 3]))
    assert batch["inputs"].tolist() == [[[8, 9], [10, 11]], [[0, 1], [2, 3]], [[0, 0], [0, 0]]]
    assert batch["targets"].tolist() == [7, 5, IGNORED]
    assert rows.text_bytes(np.array([0])) == 0
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("indices", [[0, 1], [1, 1, 0]])
def test_samples_may_repeat_in_any_order(indices: list[int]) -> None:
    windows = stream([5, 5], 4, TABLE)
    one_by_one = [windows.take(np.array([index]))["input_ids"][0].tolist() for index in indices]
    assert windows.take(np.array(indices))["input_ids"].tolist() == one_by_one
