"""Tokens to text as they come: whole characters only, with stop strings detected across tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress, islice

Decode = Callable[[Sequence[int]], str]

#: A decoder's text for bytes that are not (yet) a character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
#: Tokens at the end of a prompt among which the context of its completion is looked for: a few characters of bytes.
_MOST_CONTEXT = 16


class TextStream:
    """Text of one completion, token by token.

    `decode` turns token ids into text, as a tokenizer does. The results of `push` and `finish`, joined, are the text
    before the first of the `stop` strings, which follows the text of `prompt`: the two together are `decode` of all
    tokens. (Where a run of bytes is no text, a decoder may take back characters that were whole; they stay.)
    `special` has the texts of tokens that are not part of the text, yet a stop string may be found in them.
    `stopped` is the stop string that was found, or None; after it `push` returns "".
    """

    def __init__(
        self,
        decode: Decode,
        stop: Sequence[str] = (),
        *,
        prompt: Sequence[int] = (),
        special: Mapping[int, str] | None = None,
    ) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._special = special or {}
        last = islice((id for id in reversed(prompt) if id not in self._special), _MOST_CONTEXT)
        self._ids = _context(decode, list(last))  # the window: tokens whose text may still change, and their context
        self._emitted_tokens = len(self._ids)  # tokens of the window whose text was returned
        self._emitted_characters = len(decode(self._ids)) if self._ids else 0  # the same of its text
        self._withheld = ""  # whole characters that may begin a stop string
        self._shown: list[bool] = []  # for each of them, whether it is part of the text
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The new text that is certain after `token`; often "", never half a character."""
        if self.stopped is not None:
            return ""
        if token in self._special:
            return self._pass(self._special[token], shown=False)
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = _without_broken_end(text)
        fresh = whole[self._emitted_characters :]
        self._emitted_characters = max(self._emitted_characters, len(whole))
        if whole == text and fresh:
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
        rest += "".join(compress(self._withheld, self._shown))
        self._withheld, self._shown = "", []
        self._ids, self._emitted_tokens, self._emitted_characters = [], 0, 0
        return rest

    def _pass(self, fresh: str, shown: bool = True) -> str:
        """The text up to the first stop string, without an end that may begin one; `fresh` is new, and part of the text
        if `shown`."""
        if not self._stop:
            return fresh if shown else ""
        text, visible = self._withheld + fresh, [*self._shown, *[shown] * len(fresh)]
        matches = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if matches:
            end, self.stopped = min(matches, key=lambda item: (item[0], -len(item[1])))
            self._withheld, self._shown = "", []
        else:
            end = len(text) - max(_overlap(text, stop) for stop in self._stop)
            self._withheld, self._shown = text[end:], visible[end:]
        return "".join(compress(text[:end], visible))


def _context(decode: Decode, backwards: Sequence[int]) -> list[int]:
    """The fewest last tokens with a text of their own, from a prompt's last ones, last first; [] if there are none.

    A text that begins or ends inside a character is none: a decoder may break a whole run of bytes for one of them.
    """
    for size in range(1, len(backwards) + 1):
        ids = [*reversed(backwards[:size])]
        text = decode(ids)
        if _BROKEN not in text and (text or size == len(backwards)):
            return ids
    return []


def _without_broken_end(text: str) -> str:
    """`text` without the broken characters at its end. Further bytes may complete them, and all of them at once: one
    incomplete character breaks every byte of its run for sentencepiece's byte tokens."""
    return text.rstrip(_BROKEN)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
