"""Tokens to text as they come: whole characters only, with stop strings detected across tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: A decoder's text for bytes that are not (yet) a character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
#: A character has at most four bytes, so at most three can be incomplete.
_MOST_BROKEN = 3


class TextStream:
    """Text of one completion, token by token.

    `decode` turns token ids into text (a tokenizer's decode, with or without special tokens). The results of `push` and
    `finish`, joined, are the text before the first of the `stop` strings. `stopped` is that stop string, or None; after
    it `push` returns "".
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []  # the window: tokens whose text may still change, and their context
        self._emitted_tokens = 0  # tokens of the window whose text was returned
        self._emitted_characters = 0  # characters of the window's text that were returned
        self._withheld = ""  # whole characters that may begin a stop string
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The new text that is certain after `token`; often "", never half a character."""
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
        """The text withheld so far, broken characters as U+FFFD: the completion has ended."""
        if self.stopped is not None:
            return ""
        rest = self._pass(self._decode(self._ids)[self._emitted_characters :] if self._ids else "")
        rest, self._withheld = rest + self._withheld, ""
        self._ids, self._emitted_tokens, self._emitted_characters = [], 0, 0
        return rest

    def _pass(self, fresh: str) -> str:
        """`fresh` up to the first stop string, without an end that may begin one."""
        text = self._withheld + fresh
        matches = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if matches:
            at, self.stopped = min(matches, key=lambda item: (item[0], -len(item[1])))
            self._withheld = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


def _without_broken_end(text: str) -> str:
    """`text` without the broken characters at its end that further bytes may complete."""
    end = len(text)
    while end > 0 and len(text) - end < _MOST_BROKEN and text[end - 1] == _BROKEN:
        end -= 1
    return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
