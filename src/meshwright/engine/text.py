"""Tokens to text as they come: whole characters only, and stop strings found across token borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What a decoder writes for bytes that are not (yet) a character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
#: A character has at most four bytes, so at most three of them can be waiting for the next token.
_LONGEST_WAIT = 3


class TextStream:
    """Text of one completion, grown a token at a time.

    `decode` turns token ids into text (a tokenizer's decode, special tokens skipped or not, as the caller wants).
    What `push` and `finish` return, joined, is the text up to the first of the `stop` strings, which is left out.
    `stopped` is the stop string that was met, or None. After it, `push` returns "".
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []  # the window: tokens whose text may still change, and those before that shape it
        self._emitted_tokens = 0  # tokens of the window whose text is out
        self._emitted_characters = 0  # characters of the window's text that are out
        self._withheld = ""  # whole characters kept back because they may begin a stop string
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain once `token` is known; often "", never half a character."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = _without_broken_end(text)
        fresh = whole[self._emitted_characters :]
        self._emitted_characters = max(self._emitted_characters, len(whole))
        if whole == text:
            # Keep the last piece as context: some tokenizers write a leading space only inside a text.
            self._ids = self._ids[self._emitted_tokens :]
            self._emitted_tokens = len(self._ids)
            self._emitted_characters = len(self._decode(self._ids))
        return self._pass(fresh)

    def finish(self) -> str:
        """What is still kept back, broken characters as U+FFFD: the completion has ended."""
        if self.stopped is not None:
            return ""
        rest = self._pass(self._decode(self._ids)[self._emitted_characters :] if self._ids else "")
        rest, self._withheld = rest + self._withheld, ""
        self._ids, self._emitted_tokens, self._emitted_characters = [], 0, 0
        return rest

    def _pass(self, fresh: str) -> str:
        """`fresh` behind the stop strings: cut at the first one, its possible beginnings kept back."""
        text = self._withheld + fresh
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            at, self.stopped = min(found, key=lambda item: (item[0], -len(item[1])))
            self._withheld = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


def _without_broken_end(text: str) -> str:
    """`text` less the broken characters at its end that further bytes may still complete."""
    end = len(text)
    while end > 0 and len(text) - end < _LONGEST_WAIT and text[end - 1] == _BROKEN:
        end -= 1
    return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
