"""Text to tokens and back: a byte-level BPE trained on the corpus, plain bytes, or an existing tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from meshwright.errors import InputError, Problem
from meshwright.files import parse_json, read_capped, refuse_damaged

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
#: Tokenizer class of a tokenizer_config.json, without its suffix Fast -> the special tokens that it has where no file
#: says other; a test holds them to `transformers`.
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
}
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
        for name in END_TOKENS if eos is None else [eos]:
            if name in vocabulary:
                return name
        what = "does not say which token ends a text"
        raise InputError(Problem(where, what, "name one as eos_token in tokenizer_config.json"))

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """From a tokenizer.json or the folder that holds one. Raises InputError, also where that is of a checkpoint and
        a file of the tokenizer was changed since."""
        path = Path(path)
        near = 'nearest: "bpe", "bytes", or the path of a tokenizer.json or of a folder with one'
        files, where = read_files(path, near), path / "tokenizer.json" if path.is_dir() else path
        names = SIDE_FILES if where.name == "tokenizer.json" else ()
        refuse_damaged(where.parent, {name: files.get(name) for name in names})
        return cls(files, where=str(where))

    def tokens_from(self, first: int) -> list[str]:
        """The tokens of the ids from `first` on, in their order."""
        return [str(self._inner.id_to_token(id)) for id in sorted(self._inner.get_vocab().values()) if id >= first]

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
    files = present_files(path)
    json_file = path / "tokenizer.json" if path.is_dir() else path
    if "tokenizer.json" in files:
        return files
    others = [name for name in ("tokenizer.model", "vocab.json") if name in files]
    if others:
        what = f"is missing; beside it is {others[0]}, which is not read"
        convert = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers writes one"
        raise InputError(Problem(str(json_file), what, convert))
    raise InputError(Problem(str(json_file), "cannot be read: No such file or directory", hint))


def present_files(path: Path) -> dict[str, bytes]:
    """As `read_files`, of the files that are there."""
    json_file = path / "tokenizer.json" if path.is_dir() else path
    paths = {"tokenizer.json": json_file}
    if json_file.name == "tokenizer.json":  # files beside one of another name may belong to another tokenizer
        paths |= {name: json_file.parent / name for name in SIDE_FILES[1:]}
    present = {name: file for name, file in paths.items() if file.is_file() or (file == json_file and file.exists())}
    return {name: read_capped(file, _FILE_BYTES, follow_links=True) for name, file in present.items()}


def build(files: Mapping[str, bytes], where: str) -> tokenizers.Tokenizer:
    """The tokenizer of `files`, with the added and the special tokens that its side files name, as `transformers` has
    it. A special token that no file gives an id has its id in the vocabulary or the next one.

    Raises InputError if tokenizer.json is broken, or a side file gives a token another id.
    """
    try:
        inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception for anything wrong with the JSON
        problem = Problem(where, f"is no tokenizer.json: {error}", 'tokenizer = "bpe" trains one')
        raise InputError(problem) from error
    inner.no_padding()
    inner.no_truncation()
    config = _object(files, "tokenizer_config.json", where)
    inner.encode_special_tokens = config.get("split_special_tokens") is True
    named, extra = _special_tokens(files, where)
    known, listed = inner.get_added_tokens_decoder(), _added_tokens(inner, files, where)
    inner.add_tokens([token for index, token in listed if known.get(index) != token])
    for index, token in listed:
        if inner.token_to_id(token.content) != index:
            other = inner.token_to_id(token.content)
            what = f"gives {token.content!r} the id {other}, but the files beside it give it {index}"
            raise InputError(Problem(where, what, "save the tokenizer again with transformers"))
    added = {token.content for token in inner.get_added_tokens_decoder().values()}
    inner.add_tokens([token for token in (*named.values(), *extra) if token.content not in added])
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


def _added_tokens(
    inner: tokenizers.Tokenizer, files: Mapping[str, bytes], where: str
) -> list[tuple[int, tokenizers.AddedToken]]:
    """Ids and tokens, by id, of tokenizer_config.json's `added_tokens_decoder` or, without one, of added_tokens.json
    and of `inner`. Those with a key of a special token are special."""
    named, extra = _special_tokens(files, where)
    special, others = {token.content for token in named.values()}, {token.content for token in extra}
    listed = _object(files, "tokenizer_config.json", where).get("added_tokens_decoder")
    try:
        if listed is not None:
            pairs = list(listed.items())
        else:
            ids = _object(files, "added_tokens.json", where).items()
            pairs = [(id, {"content": text, "special": text in others}) for text, id in ids]
            pairs += [(id, token.__getstate__()) for id, token in inner.get_added_tokens_decoder().items()]
        tokens = [
            (int(id), _token({**one, "special": True} if one["content"] in special else one)) for id, one in pairs
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(Problem(where, f"the added tokens beside it are not tokens with ids: {error}")) from error
    return sorted(tokens, key=lambda pair: pair[0])


def _token(said: Mapping[str, Any]) -> tokenizers.AddedToken:
    """A token of its attributes in JSON. Raises KeyError or TypeError."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(said["content"], **{flag: said[flag] for flag in flags if flag in said})


def special_tokens(files: Mapping[str, bytes], where: str) -> dict[str, str]:
    """bos_token, eos_token, ... -> its text, as `transformers` reads them: of special_tokens_map.json before
    tokenizer_config.json, of the latter alone if it lists its added tokens, and last of the tokenizer's class.

    Raises InputError for a file that is no object.
    """
    return {key: token.content for key, token in _special_tokens(files, where)[0].items()}


def _special_tokens(
    files: Mapping[str, bytes], where: str
) -> tuple[dict[str, tokenizers.AddedToken], list[tokenizers.AddedToken]]:
    """Special tokens by their keys, in the order in which new ones get ids, and those without a key."""
    config = _object(files, "tokenizer_config.json", where)
    tables = {"tokenizer_config.json": config}
    if "added_tokens_decoder" not in config:
        tables["special_tokens_map.json"] = _object(files, "special_tokens_map.json", where)
    named: dict[str, Any] = {**dict.fromkeys(SPECIAL_TOKENS), **_class_tokens(config, files)}
    extra: list[tokenizers.AddedToken] = []
    for name, table in tables.items():
        path = str(Path(where).with_name(name))
        more = table.get("extra_special_tokens") or []
        by_key = more if isinstance(more, dict) else {}
        for key, said in {**table, **by_key}.items():
            own = key in by_key or (key.endswith("_token") and isinstance(said, str | dict))  # a key of this tokenizer
            if key in SPECIAL_TOKENS or (own and key not in named):
                named[key] = None if said is None else _special(said, path, key)
        extra = [] if by_key else [*extra, *_specials(more, path, "extra_special_tokens")]
        older = table.get("additional_special_tokens") or []
        extra = extra or _specials(older, path, "additional_special_tokens")
    return {key: token for key, token in named.items() if token is not None}, extra


def _class_tokens(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, tokenizers.AddedToken]:
    """The special tokens of the class that tokenizer_config.json names."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name == "LlamaTokenizer" and b'"ByteLevel"' in files.get("tokenizer.json", b""):
        return {}  # `transformers` reads such a folder without that class, which is not of byte-level tokenizers
    return {key: tokenizers.AddedToken(text, special=True) for key, text in CLASS_TOKENS.get(name, {}).items()}


def _specials(said: Any, path: str, key: str) -> list[tokenizers.AddedToken]:
    if not isinstance(said, list):
        raise InputError(Problem(path, f"{key} is not a list of tokens"))
    return [_special(one, path, key) for one in said]


def _special(said: Any, path: str, key: str) -> tokenizers.AddedToken:
    """A special token as JSON says it: its text, or an object of its attributes."""
    try:
        return _token({**({"content": said} if isinstance(said, str) else said), "special": True})
    except (KeyError, TypeError) as error:
        raise InputError(Problem(path, f"{key} is not a token: {str(said)[:60]}")) from error


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside `where`, {} if there is none."""
    path = str(Path(where).with_name(name))
    value = parse_json(files[name], path) if name in files else {}
    if not isinstance(value, dict):
        raise InputError(Problem(path, "is not a JSON object"))
    return value
