"""Text to tokens and back: a byte-level BPE trained on the corpus, plain bytes, or an existing tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from meshwright.errors import InputError, Problem

END_OF_TEXT = "<|endoftext|>"
#: End tokens of other families' tokenizers, for a tokenizer.json without its configuration.
END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
#: Files that belong to a tokenizer in a Hugging Face folder.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
BYTES_VOCAB = 257  # 256 bytes and the end of a text
_FILE_BYTES = 256 * 2**20  # largest tokenizer file that is read


class Tokenizer:
    """A tokenizer with its end-of-text token.

    vocab: one more than the largest id; eos: id of the end of a text. Text that spells a special token is encoded as
    plain text, so that no document can end another.
    """

    def __init__(self, files: Mapping[str, bytes], where: str = "tokenizer") -> None:
        """From a tokenizer's files, tokenizer.json among them. Raises InputError if that is broken."""
        self._files = dict(files)
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(self._files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception for anything wrong with the JSON
            problem = Problem(where, f"is no tokenizer.json: {error}", 'tokenizer = "bpe" trains one')
            raise InputError(problem) from error
        self._inner.encode_special_tokens = True
        self._inner.no_padding()
        self._inner.no_truncation()
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab: int = max(vocabulary.values(), default=-1) + 1
        end = self._end_token(vocabulary, where)
        self.eos: int = vocabulary[end]
        self._files.setdefault("tokenizer_config.json", _configuration(end))

    def _end_token(self, vocabulary: Mapping[str, int], where: str) -> str:
        eos = _json_object(self._files.get("tokenizer_config.json", b"{}"), where).get("eos_token")
        if isinstance(eos, dict):  # the older form has the token's attributes
            eos = eos.get("content")
        for name in [eos] if isinstance(eos, str) else END_TOKENS:
            if name in vocabulary:
                return name
        what = f"has no token {eos!r}, its eos_token" if eos else "does not say which token ends a text"
        raise InputError(Problem(where, what, "name one as eos_token in tokenizer_config.json"))

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """From a tokenizer.json or the folder that holds one. Raises InputError."""
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        json_file = path / "tokenizer.json" if path.is_dir() else path
        paths = {"tokenizer.json": json_file}
        if json_file.name == "tokenizer.json":  # files beside one of another name may belong to another tokenizer
            paths |= {name: folder / name for name in SIDE_FILES[1:]}
        try:
            files = {name: _read(file) for name, file in paths.items() if name == "tokenizer.json" or file.is_file()}
        except OSError as error:
            near = 'nearest: "bpe", "bytes", or the path of a tokenizer.json or of a folder with one'
            raise InputError(Problem(str(json_file), f"cannot be read: {error.strerror}", near)) from error
        return cls(files, where=str(json_file))

    def side_files(self) -> dict[str, bytes]:
        """Name -> content of the files from which `transformers` loads this tokenizer."""
        return dict(self._files)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin or end tokens."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32 [tokens], without begin or end tokens. Uses every core."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """Text of each array of ids, special tokens included, since no document has one."""
        texts = self._inner.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=False)
        return [str(text) for text in texts]

    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of text of each id, uint16 [vocab]; None if an id alone does not determine them.

        Exact for byte-level tokenizers without a normalizer. Special tokens have 0.
        """
        content = json.loads(self._inner.to_str())
        decoder = content.get("decoder") or {}
        parts = [part.get("type") for part in decoder.get("decoders", [decoder])]
        if content.get("normalizer") is not None or parts != ["ByteLevel"]:
            return None
        pre_tokenizer = json.dumps(content.get("pre_tokenizer"))
        if '"add_prefix_space": true' in pre_tokenizer:
            return None
        lengths = np.zeros(self.vocab, dtype=np.uint16)
        for token, index in content["model"]["vocab"].items():
            lengths[index] = len(token)  # one character of a byte-level vocabulary is one byte
        for added in content.get("added_tokens", []):
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return lengths


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` ids; id 0 ends a text. The same texts give the same tokenizer.

    Raises InputError if `vocab` is too small for the 256 bytes and the end token.
    """
    if vocab < BYTES_VOCAB:
        near = f"at least {BYTES_VOCAB}: 256 bytes and the end of a text"
        raise InputError(Problem("model.vocab", f"{vocab} is too small for a byte-level tokenizer", near))
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer({"tokenizer.json": inner.to_str().encode()})


def bytes_tokenizer() -> Tokenizer:
    """A tokenizer whose ids 0..255 are the bytes of UTF-8; 256 ends a text."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return _Bytes({"tokenizer.json": inner.to_str().encode()})


class _Bytes(Tokenizer):
    """Encodes bytes to the same ids directly."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table, 256 long)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _configuration(end: str) -> bytes:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _read(path: Path) -> bytes:
    if path.stat().st_size > _FILE_BYTES:
        raise InputError(Problem(str(path), f"is larger than {_FILE_BYTES} bytes, which no tokenizer is"))
    return path.read_bytes()


def _json_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(where, f"its tokenizer_config.json is not JSON: {error}")) from error
    if not isinstance(value, dict):
        raise InputError(Problem(where, "its tokenizer_config.json is not a JSON object"))
    return value
