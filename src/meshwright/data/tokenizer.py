"""Text to tokens and back: a byte-level BPE trained on the corpus, plain bytes, or an existing tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from meshwright.errors import InputError, Problem
from meshwright.files import parse_json, read_capped

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
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
#: Keys of special tokens, as a chat template knows them.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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
        self._inner = build(self._files, where)
        self._inner.encode_special_tokens = True
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab: int = max(vocabulary.values(), default=-1) + 1
        end = self._end_token(vocabulary, where)
        self.eos: int = vocabulary[end]
        self._files.setdefault("tokenizer_config.json", _configuration(end))

    def _end_token(self, vocabulary: Mapping[str, int], where: str) -> str:
        eos = special_tokens(self._files, where).get("eos_token")
        for name in [eos] if eos is not None else END_TOKENS:
            if name in vocabulary:
                return name
        what = f"has no token {eos!r}, its eos_token" if eos else "does not say which token ends a text"
        raise InputError(Problem(where, what, "name one as eos_token in tokenizer_config.json"))

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """From a tokenizer.json or the folder that holds one. Raises InputError."""
        path = Path(path)
        near = 'nearest: "bpe", "bytes", or the path of a tokenizer.json or of a folder with one'
        return cls(read_files(path, near), where=str(path / "tokenizer.json" if path.is_dir() else path))

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
    """A byte-level BPE of at most `vocab` ids, but of BYTES_VOCAB at least; id 0 ends a text. The same texts give the
    same tokenizer."""
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


def read_files(path: Path, hint: str) -> dict[str, bytes]:
    """Name -> content of the files of the tokenizer in a folder, or of a tokenizer.json and those beside it.

    Raises InputError, with `hint`, if there is no tokenizer.json.
    """
    json_file = path / "tokenizer.json" if path.is_dir() else path
    paths = {"tokenizer.json": json_file}
    if json_file.name == "tokenizer.json":  # files beside one of another name may belong to another tokenizer
        paths |= {name: json_file.parent / name for name in SIDE_FILES[1:]}
    others = [name for name in ("tokenizer.model", "vocab.json") if paths.get(name, json_file).is_file()]
    if not json_file.exists() and others:
        what = f"is missing; beside it is {others[0]}, which is not read"
        convert = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one"
        raise InputError(Problem(str(json_file), what, convert))
    if not json_file.exists():
        raise InputError(Problem(str(json_file), "cannot be read: No such file or directory", hint))
    present = {name: file for name, file in paths.items() if name == "tokenizer.json" or file.is_file()}
    return {name: read_capped(file, _FILE_BYTES, follow_links=True) for name, file in present.items()}


def build(files: Mapping[str, bytes], where: str) -> tokenizers.Tokenizer:
    """The tokenizer of `files`, with the added tokens that its side files name. Raises InputError if tokenizer.json is
    broken, or a side file gives a token another id."""
    try:
        inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception for anything wrong with the JSON
        problem = Problem(where, f"is no tokenizer.json: {error}", 'tokenizer = "bpe" trains one')
        raise InputError(problem) from error
    inner.no_padding()
    inner.no_truncation()
    config = _object(files, "tokenizer_config.json", where)
    inner.encode_special_tokens = config.get("split_special_tokens") is True
    for index, token in sorted(_added_tokens(files, where).items()):
        known = inner.get_added_tokens_decoder().get(index)
        if known is None or known.content != token.content:
            inner.add_tokens([token])
        if inner.token_to_id(token.content) != index:
            other = inner.token_to_id(token.content)
            what = f"gives {token.content!r} the id {other}, but the files beside it give it {index}"
            raise InputError(Problem(where, what, "save the tokenizer again with transformers"))
    return inner


def contradictions(inner: tokenizers.Tokenizer, files: Mapping[str, bytes], where: str) -> list[str]:
    """Keys of tokenizer_config.json, on the tokens around a text and a space before it, that say other than what
    tokenizer.json does, which is followed."""
    config, special = _object(files, "tokenizer_config.json", where), special_tokens(files, where)
    around = set(inner.encode("", add_special_tokens=True).tokens)
    does = {f"add_{name}": special.get(name) in around for name in ("bos_token", "eos_token")}
    pre_tokenizer = json.loads(inner.to_str()).get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for part in parts:
        if part.get("type") == "ByteLevel":
            does["add_prefix_space"] = part["add_prefix_space"]
    return [key for key, done in does.items() if isinstance(config.get(key), bool) and config[key] != done]


def _added_tokens(files: Mapping[str, bytes], where: str) -> dict[int, tokenizers.AddedToken]:
    """Id -> token of tokenizer_config.json's `added_tokens_decoder` or, without one, of added_tokens.json."""
    named = set(special_tokens(files, where).values())
    listed = _object(files, "tokenizer_config.json", where).get("added_tokens_decoder")
    if listed is None:
        ids = _object(files, "added_tokens.json", where)
        listed = {id: {"content": text, "special": text in named} for text, id in ids.items()}
    try:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            int(id): tokenizers.AddedToken(one["content"], **{flag: one[flag] for flag in flags if flag in one})
            for id, one in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(Problem(where, f"the added tokens beside it are not tokens with ids: {error}")) from error


def special_tokens(files: Mapping[str, bytes], where: str) -> dict[str, str]:
    """bos_token, eos_token, ... -> its text, as `transformers` reads them: of special_tokens_map.json before
    tokenizer_config.json, unless the latter lists its added tokens. Raises InputError for a file that is no object."""
    config = _object(files, "tokenizer_config.json", where)
    tables = [config, _object(files, "special_tokens_map.json", where)]
    tokens = {}
    for table in tables[::-1] if "added_tokens_decoder" in config else tables:
        for name in SPECIAL_TOKENS:
            value = table.get(name)
            if isinstance(value, dict):  # the older form has the token's attributes
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
    return tokens


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside `where`, {} if there is none."""
    path = str(Path(where).with_name(name))
    value = parse_json(files[name], path) if name in files else {}
    if not isinstance(value, dict):
        raise InputError(Problem(path, "is not a JSON object"))
    return value
