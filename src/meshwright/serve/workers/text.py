"""The tokenizer of serving, from a folder's tokenizer.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from meshwright.data.tokenizer import build, contradictions, read_files

log = logging.getLogger("meshwright")


class TextTokenizer:
    """Text to ids and back. Unlike training's tokenizer it reads special tokens that are spelled out in a prompt, as
    `transformers` does, because chat templates write them so.
    """

    def __init__(self, folder: Path) -> None:
        """Reads folder/tokenizer.json and the files beside it. Raises InputError if it is missing or broken."""
        files = read_files(folder, "serving text needs a tokenizer.json")
        self._inner = build(files, str(folder / "tokenizer.json"))
        for key in contradictions(self._inner, files, str(folder / "tokenizer.json")):
            log.warning("%s: %s says other than tokenizer.json, which is followed", folder, key)
        added = self._inner.get_added_tokens_decoder()
        #: The texts of the special tokens, which `decode` leaves out, by their ids.
        self.special: Mapping[int, str] = {id: token.content for id, token in added.items() if token.special}

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Ids of `text`; `add_special` adds the tokenizer's begin and end tokens."""
        return list(self._inner.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))
