"""Streaming text: joined it is the whole text, no piece holds half a character, stop strings cut exactly."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import assume, example, given

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


#: Ways of tokenizers to write a text as tokens: ids of "<s>" and "</s>" are 0 and 1, both special.
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _tokenizer(kind: str) -> tokenizers.Tokenizer:
    decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
    words = [*_BYTES, _SPACE, *"abc", *(_SPACE + letter for letter in "abc"), "ab", _SPACE + "ab"]
    merges = [(_SPACE, letter) for letter in "abc"] + [("a", "b"), (_SPACE + "a", "b")]
    if kind == "byte-level":
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: id for id, token in enumerate(["<s>", "</s>", *letters, "ab"])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        vocab = {token: id for id, token in enumerate(["<s>", "</s>", *words])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<s>", byte_fallback=True))
        if kind == "byte-fallback":
            made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
            strip = decoders.Strip(" ", 1, 0)
            made.decoder = decoders.Sequence(
                [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), strip]
            )
        else:
            made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
            made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(["<s>", "</s>"])
    return made


_TOKENIZERS = {kind: _tokenizer(kind) for kind in ("byte-level", "byte-fallback", "metaspace")}
_runs = st.lists(st.text(st.sampled_from("abc é😀漢"), max_size=6) | st.sampled_from(["<s>", "</s>"]), max_size=6)


@pytest.mark.parametrize("kind", _TOKENIZERS)
@given(runs=_runs, at=st.integers(0, 40))
@example(runs=["a b c"], at=1)
@example(runs=["a", "</s>", " b"], at=3)
@example(runs=["é😀", "<s>", "😀é"], at=0)
@example(runs=["   ", " a"], at=1)
def test_prompt_and_pieces_are_the_whole_text(kind: str, runs: list[str], at: int) -> None:
    """Wherever a prompt ends, and with special tokens in between."""
    made = _TOKENIZERS[kind]
    ids = [id for run in runs for id in made.encode(run).ids]
    prompt, rest = ids[:at], ids[at:]
    before = made.decode(prompt)
    assume("\N{REPLACEMENT CHARACTER}" not in before)
    streamed = TextStream(made.decode, prompt=prompt, special={0: "<s>", 1: "</s>"})
    pieces = [*map(streamed.push, rest), streamed.finish()]
    assert before + "".join(pieces) == made.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [" b", "</s>", "a</s>", "</s> b", "<s>", " a</s> b c"])
def test_a_stop_string_is_met_wherever_the_text_has_it(stop: str) -> None:
    """The text with its special tokens is "a a</s> b c<s>", of which the first "a" is the prompt's."""
    made = _TOKENIZERS["byte-fallback"]
    ids = [*made.encode("a a").ids, 1, *made.encode("b c").ids, 0]
    streamed = TextStream(made.decode, [stop], prompt=ids[:1], special={0: "<s>", 1: "</s>"})
    text = "".join([*map(streamed.push, ids[1:]), streamed.finish()])
    assert streamed.stopped == stop
    assert text == " a</s> b c<s>".partition(stop)[0].replace("</s>", "")


def test_an_end_that_only_began_a_stop_string_is_text_without_its_special_tokens() -> None:
    made = _TOKENIZERS["byte-fallback"]
    streamed = TextStream(made.decode, ["</s> c"], special={1: "</s>"})
    pieces = [streamed.push(id) for id in (*made.encode("a").ids, 1, *made.encode("b").ids, 1)]
    assert pieces == ["a", "", " b", ""] and streamed.finish() == "" and streamed.stopped is None
