"""The tokenizer of serving, from a folder's tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from meshwright.errors import InputError, Problem

MAX_TOKENIZER_BYTES = 256 << 20


class TextTokenizer:
    """Text to ids and back. Unlike training's tokenizer it reads special tokens that are spelled out in a prompt, as
    `transformers` does, because chat templates write them so.
    """

    def __init__(self, folder: Path) -> None:
        """Reads folder/tokenizer.json. Raises InputError if it is missing or broken."""
        path = folder / "tokenizer.json"
        if not path.is_file() or path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise InputError(Problem(str(path), "is missing or too large", "serving text needs a tokenizer.json"))
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for broken JSON
            raise InputError(Problem(str(path), f"is not a tokenizer: {error}")) from error
        self._inner.no_padding()
        self._inner.no_truncation()
        added = self._inner.get_added_tokens_decoder()
        #: The texts of the special tokens, which `decode` leaves out, by their ids.
        self.special: Mapping[int, str] = {id: token.content for id, token in added.items() if token.special}

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Ids of `text`; `add_special` adds the tokenizer's begin and end tokens."""
        return list(self._inner.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))
