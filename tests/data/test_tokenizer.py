from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.checkpoint import ModelFolder
from meshwright.data.corpus import Scan, make_tokenizer
from meshwright.data.sources import open_source
from meshwright.data.tokenizer import (
    BYTES_VOCAB,
    CLASS_TOKENS,
    END_OF_TEXT,
    Tokenizer,
    byte_characters,
    bytes_tokenizer,
    train_bpe,
)
from meshwright.errors import InputError
from meshwright.job import Job
from meshwright.layout import Layout
from meshwright.serve.workers.chat import read_chat_template
from meshwright.serve.workers.text import TextTokenizer
from tests.checkpoint.simulate import save_world, shapes_of, world_pieces

CORPUS = ["def read(path):\n    return open(path).read()\n", "def write(path, text):\n    open(path).write(text)\n"] * 5
BPE = train_bpe(CORPUS, 280)
BYTES = bytes_tokenizer()
any_text = st.text(st.characters(codec="utf-8"), max_size=80) | st.sampled_from(
    [END_OF_TEXT, f"a{END_OF_TEXT}b", "\0", "é\u0301", "🇫🇷"]
)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=any_text)
def test_text_comes_back_and_no_text_ends_a_document(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids
    assert all(0 <= index < tokenizer.vocab for index in ids)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(texts=st.lists(any_text, max_size=4))
def test_many_at_once_agree_with_one_by_one_and_with_their_bytes(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode_documents(encoded) == texts
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and lengths[tokenizer.eos] == 0
    assert [int(lengths[ids].sum()) for ids in encoded] == [len(text.encode()) for text in texts]


def test_bpe_training_is_deterministic_and_keeps_to_its_size() -> None:
    assert train_bpe(CORPUS, 280).side_files() == BPE.side_files()
    assert BPE.vocab == 280 and BPE.eos == 0
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0])
    assert train_bpe(["ab"], 5000).vocab < 300  # nothing more to merge


def test_bytes_are_their_own_ids() -> None:
    assert BYTES.encode("aé") == list("aé".encode())
    assert (BYTES.vocab, BYTES.eos) == (BYTES_VOCAB, 256)
    assert len(set(byte_characters())) == 256


def test_a_vocabulary_has_room_for_the_bytes() -> None:
    assert train_bpe(CORPUS, 100).vocab == BYTES_VOCAB


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_transformers_loads_the_side_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, tokenizer.side_files())
    text = CORPUS[0] + " naïve 🙂"
    for loader in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = loader.from_pretrained(folder)
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.eos_token_id == tokenizer.eos and theirs.eos_token == END_OF_TEXT
        assert theirs.decode(tokenizer.encode(text)) == text


def test_loading_from_a_folder_or_its_file_is_the_same(tmp_path: Path) -> None:
    write(tmp_path, {**BPE.side_files(), "chat_template.jinja": b"{{ messages }}"})
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.encode(CORPUS[1]) == BPE.encode(CORPUS[1])
        assert loaded.side_files()["chat_template.jinja"] == b"{{ messages }}"
    alone = tmp_path / "mine.json"
    alone.write_bytes(BPE.side_files()["tokenizer.json"])
    assert set(Tokenizer.load(alone).side_files()) == {"tokenizer.json", "tokenizer_config.json"}


def test_the_configuration_names_the_end_token(tmp_path: Path) -> None:
    files = BPE.side_files()
    for said, eos in [("Ġ", BPE.encode(" ")[0]), ({"content": END_OF_TEXT, "lstrip": False}, 0), ("<new>", 280)]:
        write(tmp_path, {**files, "tokenizer_config.json": json.dumps({"eos_token": said}).encode()})
        assert Tokenizer.load(tmp_path).eos == eos
    write(tmp_path, {"tokenizer_config.json": b'{"eos_token": ""}'})
    with pytest.raises(InputError, match="does not say which token ends a text"):
        Tokenizer.load(tmp_path)


def test_special_tokens_come_from_every_file_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    content = json.loads(BYTES.side_files()["tokenizer.json"])
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    added = {"added_tokens_decoder": {"257": {"content": "<end>", "special": True}}}
    ends = {"special_tokens_map.json": b'{"eos_token": {"content": "<end>"}}'}
    for config, files, end in (
        ({**plain, **added, "eos_token": "<end>"}, {}, 257),
        (plain, {**ends, "added_tokens.json": b'{"<end>": 257}'}, 257),
        ({**plain, "eos_token": END_OF_TEXT}, {**ends, "added_tokens.json": b'{"<end>": 257}'}, 257),
        ({**plain, **added, "eos_token": END_OF_TEXT}, ends, 256),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        files = {**files, "tokenizer_config.json": json.dumps(config).encode()}
        write(folder, {**files, "tokenizer.json": json.dumps(content).encode()})
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.eos == theirs.eos_token_id == end
        assert ours.vocab == len(theirs) == 258
        served = TextTokenizer(folder)
        assert served.encode("a<end>b", add_special=False) == theirs.encode("a<end>b", add_special_tokens=False)
        assert served.decode([97, 257, 98]) == "ab"
        assert read_chat_template(folder).special["eos_token"] == theirs.eos_token
        assert ours.side_files().keys() >= files.keys()


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("content", "config", "files"),
    [
        ({}, {"additional_special_tokens": ["<x>"]}, {}),
        ({}, {"extra_special_tokens": ["<x>", "<x>"]}, {}),
        ({}, {"extra_special_tokens": {"image_token": "<x>"}}, {}),
        ({}, {"image_token": "<x>"}, {"image_token": "<y>"}),
        ({}, {"pad_token": "<x>", "sep_token": None}, {"pad_token": {"content": "<y>", "lstrip": True}}),
        ({}, {"pad_token": "<x>"}, {"pad_token": None, "extra_special_tokens": ["<y>"]}),
        ({}, {}, {"additional_special_tokens": ["<x>", "<y>"], "eos_token": "<y>"}),
        ({}, {"added_tokens_decoder": {}, "pad_token": "<x>"}, {"eos_token": "<y>"}),
        ({"model": ["<x>"]}, {"bos_token": "<x>"}, {}),
        ({"added": ["<x>"]}, {"eos_token": "<x>"}, {}),
        ({"added": ["<x>"]}, {"added_tokens_decoder": {"257": {"content": "<x>", "special": True}}}, {}),
        ({"added": ["<x>"]}, {"added_tokens_decoder": {"257": {"content": "<x>"}}, "pad_token": "<x>"}, {}),
    ],
)
def test_special_tokens_named_only_in_side_files_are_special_as_in_transformers(
    tmp_path: Path, content: dict[str, list[str]], config: dict[str, object], files: dict[str, object]
) -> None:
    transformers = pytest.importorskip("transformers")
    saved = json.loads(BYTES.side_files()["tokenizer.json"])
    for token in content.get("model", []):
        saved["model"]["vocab"][token] = 256
        saved["added_tokens"][0]["id"] = 257
    inner = tokenizers.Tokenizer.from_str(json.dumps(saved))
    inner.add_tokens(content.get("added", []))
    others = {"tokenizer_config.json": {**PLAIN, **config}, "special_tokens_map.json": files}
    write(tmp_path, {name: json.dumps(value).encode() for name, value in others.items()})
    write(tmp_path, {"tokenizer.json": inner.to_str().encode()})
    served, theirs = TextTokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a<x>b", "a <x> b<y> c", f"<x>{END_OF_TEXT}"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert served.encode(text, add_special=False) == ids
        assert served.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert set(theirs.all_special_tokens) <= set(served.special.values())
    assert read_chat_template(tmp_path).special == {k: str(v) for k, v in theirs.special_tokens_map.items()}
    assert Tokenizer.load(tmp_path).vocab == len(theirs)


@pytest.mark.parametrize("name", [*CLASS_TOKENS, "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("byte_level", [False, True])
def test_special_tokens_of_a_class_are_those_of_transformers(tmp_path: Path, name: str, byte_level: bool) -> None:
    transformers = pytest.importorskip("transformers")
    content = json.loads(BYTES.side_files()["tokenizer.json"])
    if not byte_level:
        content |= {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never"}}
        content |= {"decoder": None}
    write(tmp_path, {"tokenizer.json": json.dumps(content).encode()})
    for said in ({}, {"unk_token": None, "eos_token": "<end>"}):
        write(tmp_path, {"tokenizer_config.json": json.dumps({"tokenizer_class": name, **said}).encode()})
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert read_chat_template(tmp_path).special == {k: str(v) for k, v in theirs.special_tokens_map.items()}
        assert Tokenizer.load(tmp_path).vocab == len(theirs)


def test_a_special_token_beyond_the_models_vocabulary_is_refused_by_its_name(tmp_path: Path) -> None:
    config = {**PLAIN, "eos_token": END_OF_TEXT, "extra_special_tokens": [f"<{name}>" for name in "abcd"]}
    write(tmp_path, {**BYTES.side_files(), "tokenizer_config.json": json.dumps(config).encode()})
    job = Job(
        model={"family": "llama", "vocab": BYTES_VOCAB, "layers": 1, "hidden": 8, "heads": 1, "ffn": 8},
        data={"source": "stdlib", "seq_len": 4, "tokenizer": str(tmp_path)},
        train={"steps": 1, "lr": 1e-3, "global_batch": 1},
    )
    with pytest.raises(InputError, match=r"261 ids, .* 257 rows, none for '<a>', '<b>', '<c>' and 1 more; nearest"):
        make_tokenizer(str(tmp_path), job.model, open_source("stdlib", "text"), Scan(0, 0, 0, 0, 0, 0, (), 0))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", b'{"extra_special_tokens": "<x>"}', "extra_special_tokens is not a list of tokens"),
        ("tokenizer_config.json", b'{"pad_token": 5}', r"tokenizer_config.json: pad_token is not a token: 5"),
        ("special_tokens_map.json", b'{"pad_token": {}}', r"special_tokens_map.json: pad_token is not a token"),
        ("added_tokens.json", b'{"<end>": 256}', "gives '<end>' the id 257, but the files beside it give it 256"),
        ("added_tokens.json", b'{"<end>": 300}', "gives '<end>' the id 257, but the files beside it give it 300"),
        ("added_tokens.json", b'{"<end>": "x"}', "are not tokens with ids"),
        ("added_tokens.json", b"[]", r"added_tokens.json: is not a JSON object"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {}}}', "are not tokens with ids"),
        ("special_tokens_map.json", b'{"a": 1, "a": 2}', "special_tokens_map.json: .*key 'a' is given twice"),
    ],
)
def test_side_files_that_contradict_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    write(tmp_path, {**BYTES.side_files(), name: content})
    for read in (Tokenizer.load, TextTokenizer):
        with pytest.raises(InputError, match=said):
            read(tmp_path)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("said", "is_said"),
    [
        ({}, False),
        ({"add_bos_token": True}, True),
        ({"add_bos_token": None, "add_eos_token": False, "add_prefix_space": False}, False),
        ({"add_eos_token": True}, True),
        ({"add_prefix_space": True}, True),
        ({"split_special_tokens": True}, False),
    ],
)
def test_what_a_configuration_says_of_the_ends_of_a_text_is_not_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, adds: bool, said: dict[str, bool], is_said: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer.from_buffer(BYTES.side_files()["tokenizer.json"])
    inner.add_special_tokens(["<s>"])
    if adds:
        words = {"single": "<s>:0 $A:0", "pair": "<s>:0 $A:0 $B:0", "special_tokens": [("<s>", 257)]}
        inner.post_processor = tokenizers.processors.TemplateProcessing(**words)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END_OF_TEXT}
    config = json.dumps({**named, **said}).encode()
    write(tmp_path, {"tokenizer.json": inner.to_str().encode(), "tokenizer_config.json": config})
    served = TextTokenizer(tmp_path)
    assert bool(caplog.messages) == (is_said and not (adds and "add_bos_token" in said))
    if not caplog.messages:
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert served.encode("a<s>b", add_special=True) == theirs("a<s>b").input_ids


def test_a_folder_whose_tokenizer_is_not_read_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"spm")
    job = Job(
        model={"hf": str(tmp_path)},
        data={"source": "stdlib", "seq_len": 4},
        train={"steps": 1, "lr": 1e-3, "global_batch": 1},
    )
    for read in (Tokenizer.load, TextTokenizer):
        with pytest.raises(InputError, match=r"tokenizer\.json: is missing; beside it is tokenizer\.model"):
            read(Path(job.data.tokenizer))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    content = json.loads(BYTES.side_files()["tokenizer.json"])
    content["added_tokens"] = []
    with pytest.raises(InputError, match="which token ends a text; name one as eos_token"):
        Tokenizer({"tokenizer.json": json.dumps(content).encode()})


def test_bytes_are_not_claimed_where_a_normalizer_changes_them() -> None:
    content = json.loads(BPE.side_files()["tokenizer.json"])
    content["normalizer"] = {"type": "NFC"}
    assert Tokenizer({"tokenizer.json": json.dumps(content).encode()}).byte_lengths() is None


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_bad_input(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(broken)
    with pytest.raises(InputError, match=r"is no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    write(tmp_path, {**BPE.side_files(), "tokenizer_config.json": broken})
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is n"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_tokenizer_of_a_checkpoint_is_held_to_its_digests(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.ones(3)}
    model_files = ModelFolder({"w": "w"}, BPE.side_files())
    save_world(tmp_path, 1, world_pieces(Layout(), shapes_of(tensors)), tensors, model_files=model_files)
    folder = tmp_path / "step-1" / "model"
    for path in (folder, folder / "tokenizer.json"):
        assert Tokenizer.load(path).side_files() == BPE.side_files()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b"\n")
    for path in (folder, folder / "tokenizer.json"):
        with pytest.raises(InputError, match=rf"step-1/model/{name}: does not have the manifest's digest"):
            Tokenizer.load(path)
    if name != "tokenizer.json":
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"step-1/model/{name}: does not have the manifest's digest"):
            Tokenizer.load(folder)
    (folder / name).write_bytes(content)
    manifest = folder.parent / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"world":', b'"word":'))
    with pytest.raises(InputError, match=r"manifest\.json: does not have its digest"):
        Tokenizer.load(folder)


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'No such file.*nearest: "bpe"'):
        Tokenizer.load(tmp_path)
