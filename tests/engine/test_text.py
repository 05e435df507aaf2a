"""Streaming text: joined it is the whole text, no piece holds half a character, stop strings cut exactly."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import example, given

from meshwright.engine import TextStream

#: Tokens that are runs of bytes, so that token borders fall inside characters.
_texts = st.text(st.sampled_from("abc \né€😀漢ä"), max_size=30)
_cuts = st.lists(st.integers(1, 4), min_size=1, max_size=40)


def pieces(text: str, cuts: Sequence[int]) -> list[bytes]:
    data, out, at = text.encode(), [], 0
    for size in [*cuts, *[1] * len(data)]:
        if at < len(data):
            out.append(data[at : at + size])
            at += size
    return out


def stream(tokens: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    made = TextStream(lambda ids: b"".join(tokens[id] for id in ids).decode(errors="replace"), stop)
    out = [made.push(index) for index in range(len(tokens))]
    return [*out, made.finish()], made


@given(_texts, _cuts)
@example("😀", [1, 1, 1, 1])
def test_whole_characters_and_the_whole_text(text: str, cuts: list[int]) -> None:
    out, _ = stream(pieces(text, cuts))
    assert "".join(out) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out)


@given(_texts, _cuts, st.lists(st.text(st.sampled_from("abc é😀"), min_size=1, max_size=4), min_size=1, max_size=3))
@example("aab", [1, 1, 1], ["ab"])
def test_stop_strings_across_token_borders(text: str, cuts: list[int], stop: list[str]) -> None:
    out, made = stream(pieces(text, cuts), stop)
    joined = "".join(out)
    found = [text.find(s) for s in stop if s in text]
    if not found:
        assert joined == text and made.stopped is None
        return
    # A stop string is acted on as soon as it is complete, so one that ends earlier wins over one that begins earlier.
    assert made.stopped in stop and made.stopped is not None
    assert text.startswith(joined + made.stopped)
    assert not any(s in joined for s in stop)


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=20))
def test_bytes_that_are_no_text_come_out_as_the_decoder_writes_them(tokens: list[bytes]) -> None:
    out, _ = stream(tokens)
    assert "".join(out) == b"".join(tokens).decode(errors="replace")


def test_nothing_after_a_stop() -> None:
    out, made = stream([b"on", b"e ST", b"OP two", b" three"], ["STOP"])
    assert out == ["on", "e ", "", "", ""] and made.stopped == "STOP"


def test_leading_spaces_of_later_tokens_are_kept() -> None:
    """A sentencepiece decoder drops the space in front of the first word of whatever it is given."""
    words = ["▁the", "▁cat", "s", "▁sat"]
    made = TextStream(lambda ids: "".join(words[id] for id in ids).replace("▁", " ").removeprefix(" "))
    assert "".join([*(made.push(index) for index in range(4)), made.finish()]) == "the cats sat"
