"""From a source to token files: count the documents, hold some out, choose a tokenizer, pack the tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from meshwright.data.sources import Document, TextSource
from meshwright.data.tokenizer import Tokenizer, bytes_tokenizer, read_files, train_bpe
from meshwright.errors import InputError, Problem
from meshwright.families import vocab_of_folder
from meshwright.job.checks import PATH_KEYS

if TYPE_CHECKING:
    from meshwright.job.sections import ModelSection

logger = logging.getLogger("meshwright")

#: A tokenizer is trained on about this much text at most, sampled from the whole corpus by hash.
TOKENIZER_BYTES = 64 * 2**20
_PROBLEMS_SHOWN = 20
_BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Scan:
    """Counts from one reading of a source. `bytes` is of the text of `documents`; `held_out_below` sets the split."""

    documents: int
    bytes: int
    empty: int
    undecodable: int
    duplicates: int
    broken: int
    problems: tuple[Problem, ...]
    held_out_below: int  # a document is held out if the first 64 bits of its hash are below

    def is_held_out(self, text: str) -> bool:
        """Whether a document is held out: equal texts are on the same side, whatever else is in the corpus."""
        return _hash(text)[0] < self.held_out_below


def scan_source(source: TextSource, held_out: float) -> Scan:
    """Reads every document once. Counts broken records and describes the first ones; raises nothing for them."""
    seen: set[tuple[int, int]] = set()
    documents = size = empty = undecodable = broken = 0
    problems: list[Problem] = []
    for record in source.documents():
        if isinstance(record, Document):
            if not record.text.strip():
                empty += 1
                continue
            documents += 1
            size += len(record.text.encode())
            seen.add(_hash(record.text))
            continue
        broken += record.broken
        undecodable += not record.broken
        if not record.broken:
            logger.info("left out: %s", record.problem)
        if record.broken and len(problems) < _PROBLEMS_SHOWN:
            problems.append(record.problem)
    below = int(held_out * 2**64)
    if held_out > 0 and len({first for first, _ in seen}) > 1:  # at least one document on each side
        below = min(max(below, min(seen)[0] + 1), max(seen)[0])
    elif len(seen) < 2:
        below = 0  # one document: nothing can be held out
    return Scan(documents, size, empty, undecodable, documents - len(seen), broken, tuple(problems), below)


def broken_records(scan: Scan, source: TextSource) -> tuple[Problem, ...]:
    """The first broken records, and the number of the others."""
    more = scan.broken - len(scan.problems)
    return (*scan.problems, Problem(source.name, f"{more} more broken records")) if more else scan.problems


def refuse_broken(scan: Scan, source: TextSource) -> None:
    """Raises InputError if a record is broken or there is no text."""
    if scan.broken:
        raise InputError(broken_records(scan, source))
    if not scan.documents:
        what = f"{source.name!r} holds no text ({scan.empty} empty, {scan.undecodable} not UTF-8)"
        raise InputError(Problem("data.source", what, "nearest: data.source=stdlib"))


def make_tokenizer(name: str, model: ModelSection, source: TextSource, scan: Scan) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; "bpe" is trained on documents that are not held out.

    Raises InputError if it does not fit the model.
    """
    vocab = model_vocab(model)
    if name == "bpe":
        if vocab is None:
            what = '"bpe" needs the rows of the model\'s embedding to know its size, and the model does not say them'
            raise InputError(Problem("data.tokenizer", what, "nearest: data.tokenizer=bytes"))
        share = min(1.0, TOKENIZER_BYTES / max(1, scan.bytes))
        texts = (text for text in _texts(source) if not scan.is_held_out(text) and _hash(text)[1] < share * 2**64)
        tokenizer = train_bpe(texts, vocab)
    else:
        tokenizer = bytes_tokenizer() if name == "bytes" else Tokenizer.load(name)
    if vocab is not None and tokenizer.vocab > vocab:
        what = f"the tokenizer {name!r} has {tokenizer.vocab} ids, but the model's embedding has {vocab} rows"
        beyond = [repr(token) for token in tokenizer.tokens_from(vocab)]
        what += f", none for {', '.join(beyond[:3])}" + (f" and {len(beyond) - 3} more" if len(beyond) > 3 else "")
        near = f"nearest: {'model' if model.module is None else 'model.arguments'}.vocab={tokenizer.vocab}"
        if model.hf is not None:  # whose embedding is what it is
            near = f"give a tokenizer of at most {vocab} ids"
        raise InputError(Problem("data.tokenizer", what, near))
    return tokenizer


def tokenizer_identity(name: str) -> str:
    """What the tokenizer that `data.tokenizer` names is, wherever it lies: a word, or the digest of its files.

    Raises InputError if there are none.
    """
    if name in PATH_KEYS["data.tokenizer"]:
        return name
    digest = hashlib.sha256()
    for file, content in sorted(read_files(Path(name), "").items()):
        digest.update(f"{file}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return f"files of digest {digest.hexdigest()}"


class _SplitWriter:
    """Running totals of one split, and its files if there is a folder."""

    def __init__(self, name: str, folder: Path | None, files: ExitStack) -> None:
        self.documents = self.tokens = self.bytes = 0
        self._files = tuple(
            files.enter_context((folder / f"{name}.{part}.bin").open("wb"))
            for part in ("tokens", "documents")
            if folder
        )

    def add(self, text: str, ids: np.ndarray, eos: int, kind: str) -> None:
        self.documents += 1
        self.tokens += len(ids) + 1
        self.bytes += len(text.encode())
        if self._files:
            tokens, documents = self._files
            tokens.write(np.append(ids, np.uint32(eos)).astype(kind).tobytes())
            documents.write(np.array([self.tokens, self.bytes], dtype="<u8").tobytes())

    def totals(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}


def pack(source: TextSource, scan: Scan, tokenizer: Tokenizer, folder: Path | None) -> dict[str, dict[str, int]]:
    """Encodes every document and appends it to the files of its split in `folder` (None: only counts).

    Writes SPLIT.tokens.bin (each document followed by the end token) and SPLIT.documents.bin. Returns the totals.
    """
    kind = token_type(tokenizer.vocab)
    with ExitStack() as files:
        train, held_out = (_SplitWriter(name, folder, files) for name in ("train", "held_out"))
        for texts in _batches(_texts(source)):
            for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
                (held_out if scan.is_held_out(text) else train).add(text, ids, tokenizer.eos, kind)
    return {"train": train.totals(), "held_out": held_out.totals()}


def token_type(vocab: int) -> str:
    """The little-endian type of stored token ids."""
    return "<u2" if vocab <= 2**16 else "<u4"


def refuse_too_short(tokens: int, seq_len: int) -> None:
    """Raises InputError if the training split does not fill one window of seq_len + 1 tokens."""
    if tokens < seq_len + 1:
        near = f"nearest: data.seq_len={tokens - 1}" if tokens > 2 else "nearest: data.source=stdlib"
        raise InputError(Problem("data.seq_len", f"{seq_len} needs {seq_len + 1} tokens; there are {tokens}", near))


def model_vocab(model: ModelSection) -> int | None:
    """Rows of a model's embedding: its vocab, its Hugging Face folder's, or its argument; None if unknown."""
    if model.hf is not None:
        return vocab_of_folder(Path(model.hf))
    vocab = model.vocab if model.vocab is not None else model.arguments.get("vocab")
    return vocab if isinstance(vocab, int) else None


def _texts(source: TextSource) -> Iterator[str]:
    """The texts of the documents that are not empty."""
    for record in source.documents():
        if isinstance(record, Document) and record.text.strip():
            yield record.text


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Groups large enough to keep every core busy, small enough for the memory."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _BATCH_BYTES or len(group) >= 4096:
            yield group
            group, size = [], 0
    if group:
        yield group


def _hash(text: str) -> tuple[int, int]:
    """128 bits of the text: the first half decides the split, both halves identify the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
