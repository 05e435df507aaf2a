from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from meshwright import data
from meshwright.data import corpus
from meshwright.data.batch import IGNORED
from meshwright.errors import InputError
from meshwright.job import Job
from meshwright.job.sections import ModelSection


def text_job(source: Path | str, vocab: int = 300, **changes: Any) -> Job:
    return Job(
        model={"family": "llama", "layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "vocab": vocab},
        data={"source": str(source), "seq_len": 16, "held_out": 0.2, **changes},
        train={"steps": 2, "lr": 1e-3, "global_batch": 4},
    )


def digits_job(**changes: Any) -> Job:
    return Job(
        model={"module": "digits:build"},
        data={"source": "digits", "held_out": 0.2, **changes},
        train={"steps": 2, "lr": 1e-3, "global_batch": 4},
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = [
        f"Document {index} says that {index} times {index} is {index * index}, étonnant. " * 3 for index in range(60)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[7], " \n", ""]))
    return path


def test_opening_gives_what_building_gave(tmp_path: Path, source: Path) -> None:
    built = data.build_manifest(text_job(source), tmp_path / "run" / "manifest")
    opened = data.Manifest.open(tmp_path / "run" / "manifest")
    assert built.content == opened.content and built.samples == opened.samples > 10
    for name, values in built.batch(3, 5, 8, 2, 6).items():
        again = opened.batch(3, 5, 8, 2, 6)[name]
        assert values.shape == again.shape == (4, 16) and (values == again).all()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".manifest.lock", "manifest"]


def test_an_epoch_holds_every_target_once_and_the_text_is_whole(tmp_path: Path, source: Path) -> None:
    manifest = data.build_manifest(text_job(source), tmp_path / "manifest")
    batches = [manifest.batch(0, step, 1, 0, 1) for step in range(manifest.samples)]
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    tokens = np.fromfile(tmp_path / "manifest" / "train.tokens.bin", dtype="<u2")
    assert sorted(targets[targets != IGNORED].tolist()) == sorted(tokens[1:].tolist())
    records = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    kept = sorted(text for text in records if text.strip())
    found = (manifest.text("train") + manifest.text("held_out")).decode()
    assert len(found) == sum(map(len, kept)) and all(text in found for text in kept)


def test_held_out_bits_per_byte_can_be_exact(tmp_path: Path, source: Path) -> None:
    manifest = data.build_manifest(text_job(source), tmp_path / "manifest")
    targets = manifest.held_out(0, manifest.held_out_samples)["targets"]
    counted = targets[targets != IGNORED]
    tokenizer = manifest.tokenizer()
    text = tokenizer.decode(counted[counted != tokenizer.eos].tolist())
    assert manifest.held_out_bytes(0, manifest.held_out_samples) == len(text.encode())
    beyond = manifest.held_out(manifest.held_out_samples, 3)
    assert beyond["targets"].shape == (3, 16) and (beyond["targets"] == IGNORED).all()
    assert manifest.held_out_bytes(manifest.held_out_samples, 3) == 0


def test_equal_documents_fall_on_the_same_side(tmp_path: Path, source: Path) -> None:
    manifest = data.build_manifest(text_job(source, held_out=0.5), tmp_path / "manifest")
    repeated = b"Document 7 says that 7 times 7 is 49"
    assert sorted([manifest.text("train").count(repeated), manifest.text("held_out").count(repeated)]) == [0, 6]


@pytest.mark.parametrize(("held_out", "train", "kept"), [(0.0, 2, 0), (1e-9, 1, 1), (0.999999, 1, 1)])
def test_the_split_leaves_both_sides_something(tmp_path: Path, held_out: float, train: int, kept: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The first document, long enough.\n\nThe second document, long enough.\n")
    job = text_job(path, tokenizer="bytes", held_out=held_out)
    splits = data.build_manifest(job, tmp_path / "manifest").content["splits"]
    assert (splits["train"]["documents"], splits["held_out"]["documents"]) == (train, kept)


def test_one_document_keeps_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One document, which is all there is.")
    manifest = data.build_manifest(text_job(path, tokenizer="bytes", held_out=0.5), tmp_path / "manifest")
    assert manifest.held_out_samples == 0
    assert manifest.held_out(0, 2)["targets"].tolist() == [[IGNORED] * 16] * 2


def test_the_survey_counts_what_the_manifest_holds(tmp_path: Path, source: Path) -> None:
    survey = data.survey(text_job(source))
    content = data.build_manifest(text_job(source), tmp_path / "manifest").content
    assert (survey.documents, survey.duplicates, survey.empty, survey.problems) == (61, 1, 2, ())
    assert survey.tokens == sum(split["tokens"] for split in content["splits"].values())
    assert survey.bytes == sum(split["bytes"] for split in content["splits"].values())
    assert survey.held_out_documents == content["splits"]["held_out"]["documents"] > 0
    manifest = data.Manifest.open(tmp_path / "manifest")
    assert (survey.samples, survey.held_out_samples) == (manifest.samples, manifest.held_out_samples)
    assert survey.vocab == manifest.tokenizer().vocab


def test_broken_records_are_listed_by_check_and_refused_by_a_run(tmp_path: Path, source: Path) -> None:
    with open(source, "a") as file:
        file.write("not json\n" * 30)
    survey = data.survey(text_job(source))
    assert survey.documents == 61 and survey.tokens == 0
    assert "corpus.jsonl:64: is not JSON" in str(survey.problems[0])
    assert "10 more broken records" in str(survey.problems[-1])
    with pytest.raises(InputError) as raised:
        data.build_manifest(text_job(source), tmp_path / "manifest")
    assert raised.value.problems == survey.problems
    assert not list(tmp_path.glob("*manifest-*")) and not (tmp_path / "manifest").exists()


def test_data_without_text_or_too_short_is_refused_with_what_works(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n\n")
    short.write_text("ten bytes!")
    with pytest.raises(InputError, match=r"holds no text.*stdlib"):
        data.build_manifest(text_job(empty), tmp_path / "manifest")
    with pytest.raises(InputError, match=r"16 needs 17 tokens; there are 11; nearest: data.seq_len=10"):
        data.build_manifest(text_job(short, tokenizer="bytes"), tmp_path / "manifest")
    assert data.build_manifest(text_job(short, tokenizer="bytes", seq_len=10), tmp_path / "manifest").samples == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(
        InputError, match=r"has 257 ids, but the model's embedding has 256 rows, none for .*; nearest: model.vocab=257"
    ):
        data.build_manifest(text_job(source, vocab=256, tokenizer="bytes"), tmp_path / "manifest")
    with pytest.raises(InputError, match=r"'bpe' has 257 ids, .*; nearest: model.vocab=257"):
        data.build_manifest(text_job(source, vocab=256), tmp_path / "manifest")


def test_large_vocabularies_are_stored_in_four_bytes() -> None:
    assert [corpus.token_type(vocab) for vocab in (257, 2**16, 2**16 + 1)] == ["<u2", "<u2", "<u4"]


def test_a_run_keeps_the_data_that_it_began_with(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "manifest"
    data.build_manifest(text_job(source), folder)
    with pytest.raises(InputError) as raised:
        data.build_manifest(text_job(source, vocab=400, seq_len=8), folder)
    text = str(raised.value)
    assert "model.vocab: is 400, but the run began with 300" in text and "data.seq_len: is 8" in text
    assert "use another run folder" in text
    moved = tmp_path / "sub" / "corpus.jsonl"
    moved.parent.mkdir()
    shutil.copy(source, moved)
    data.build_manifest(text_job(moved), folder)  # the same data elsewhere is the same data
    with open(source, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(InputError, match=r"'corpus\.jsonl' is not what it was when the run began"):
        data.build_manifest(text_job(source), folder)


def test_a_tokenizer_is_known_by_its_files_and_not_by_its_path(tmp_path: Path, source: Path) -> None:
    files = data.tokenizer.bytes_tokenizer().side_files()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name, content in files.items():
            (tmp_path / place / name).write_bytes(content)
    here, there = (text_job(source, tokenizer=str(tmp_path / place)) for place in ("here", "there"))
    data.build_manifest(here, tmp_path / "manifest")
    data.build_manifest(there, tmp_path / "manifest")
    config = tmp_path / "there" / "tokenizer_config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"data\.tokenizer: is 'files of digest .*, but the run began with 'files of"):
        data.build_manifest(there, tmp_path / "manifest")
    with pytest.raises(InputError, match=r"data\.tokenizer: is 'bytes', but the run began with 'files of digest"):
        data.build_manifest(text_job(source, tokenizer="bytes"), tmp_path / "manifest")
    shutil.rmtree(tmp_path / "here")
    data.build_manifest(here, tmp_path / "manifest")  # the manifest is enough to go on


def test_the_name_of_a_single_file_does_not_count(tmp_path: Path, source: Path) -> None:
    folder, renamed = tmp_path / "manifest", tmp_path / "renamed.jsonl"
    data.build_manifest(text_job(source), folder)
    shutil.copy(source, renamed)
    data.build_manifest(text_job(renamed), folder)
    other_reader = shutil.copy(source, tmp_path / "corpus.txt")
    with pytest.raises(InputError, match=r"'corpus\.txt' is not what it was when the run began"):
        data.build_manifest(text_job(other_reader), folder)
    # As earlier manifests have it: the name counts, and the run that has kept it goes on.
    named = json.dumps([[source.name, hashlib.sha256(source.read_bytes()).hexdigest()]])
    rewrite(folder, lambda content: content["source"].update(digest=hashlib.sha256(named.encode()).hexdigest()))
    data.build_manifest(text_job(source), folder)
    with pytest.raises(InputError, match=r"'renamed\.jsonl' is not what it was when the run began"):
        data.build_manifest(text_job(renamed), folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_manifest_that_names_its_tokenizer_by_path_is_gone_on_with(tmp_path: Path, source: Path) -> None:
    for place in ("here", "there", "other"):
        (tmp_path / place).mkdir()
        for name, content in data.tokenizer.bytes_tokenizer().side_files().items():
            (tmp_path / place / name).write_bytes(content + b" " * (place == "other"))
    here, there, other = (text_job(source, tokenizer=str(tmp_path / place)) for place in ("here", "there", "other"))
    folder = tmp_path / "manifest"
    data.build_manifest(here, folder)
    rewrite(folder, lambda content: content["settings"].update(tokenizer=here.data.tokenizer))
    for job in (here, there):
        data.build_manifest(job, folder)
    with pytest.raises(InputError, match=r"data\.tokenizer: is 'files of digest .*, but the run began with '/"):
        data.build_manifest(other, folder)
    with pytest.raises(InputError, match=r"data\.tokenizer: is 'bytes', but the run began with '/"):
        data.build_manifest(text_job(source, tokenizer="bytes"), folder)


@pytest.mark.parametrize(
    "changed", ["source", "train.tokens.bin", "held_out.documents.bin", "tokenizer/tokenizer.json"]
)
def test_a_change_that_keeps_the_size_is_seen_too(tmp_path: Path, source: Path, changed: str) -> None:
    folder = tmp_path / "manifest"
    data.build_manifest(text_job(source), folder)
    data.build_manifest(text_job(source), folder)
    file = source if changed == "source" else folder / changed
    content = bytearray(file.read_bytes())
    middle = content.index(b"a") if changed == "source" else len(content) // 2
    content[middle] ^= 1
    file.write_bytes(content)
    words = (
        r"'corpus\.jsonl' is not what it was" if changed == "source" else f"{changed}: was changed since the run began"
    )
    with pytest.raises(InputError, match=words):
        data.build_manifest(text_job(source), folder)


@pytest.mark.parametrize(
    ("was", "edited"),
    [
        (r'"eos": \d+', '"eos": 5'),
        ('"exact_bytes": true', '"exact_bytes": false'),
        (r'"empty": \d+', '"empty": 9'),
        (r'"bytes": \d+', '"bytes": 7'),
    ],
)
def test_a_change_of_the_manifest_itself_is_refused_by_name(
    tmp_path: Path, source: Path, was: str, edited: str
) -> None:
    folder = tmp_path / "manifest"
    data.build_manifest(text_job(source), folder)
    file = folder / "manifest.json"
    text, count = re.subn(was, edited, file.read_text())
    assert count and text != file.read_text()
    file.write_text(text)
    for read in (lambda: data.build_manifest(text_job(source), folder), lambda: data.Manifest.open(folder)):
        with pytest.raises(InputError, match=r"manifest/manifest\.json: was changed since the run began; bring it"):
            read()


def test_a_manifest_without_its_own_digest_is_read(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "manifest"
    built = data.build_manifest(text_job(source), folder)
    (folder / "manifest.json").write_text(json.dumps(built.content, indent=2) + "\n")  # as older runs have it
    assert data.build_manifest(text_job(source), folder).content == built.content


def test_a_run_goes_on_when_its_source_has_gone(tmp_path: Path, source: Path) -> None:
    job = text_job(source)
    before = data.build_manifest(job, tmp_path / "manifest").batch(0, 0, 4, 0, 4)
    source.unlink()
    after = data.build_manifest(job, tmp_path / "manifest").batch(0, 0, 4, 0, 4)
    assert all((before[name] == after[name]).all() for name in before)


def _build(job: Job, folder: Path, answers: Any) -> None:
    answers.put((os.getpid(), data.build_manifest(job, folder).batch(0, 0, 4, 0, 4)["input_ids"].tolist()))


def test_processes_that_ask_together_get_one_manifest(tmp_path: Path, source: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    order = (text_job(source, tokenizer="bytes"), tmp_path / "manifest", answers)
    processes = [context.Process(target=_build, args=order) for _ in range(3)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60)[1] for _ in processes]
    for process in processes:
        process.join(60)
    assert results[0] == results[1] == results[2]
    assert [process.exitcode for process in processes] == [0, 0, 0]


@pytest.mark.parametrize(
    "damage",
    ["truncate", "remove", "json", "version", "splits", "list", "missing", "type", "range", "negative"],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, source: Path, damage: str) -> None:
    folder = tmp_path / "manifest"
    data.build_manifest(text_job(source, tokenizer="bytes"), folder)
    path, tokens = folder / "manifest.json", folder / "train.tokens.bin"
    if damage == "truncate":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "remove":
        tokens.unlink()
    else:
        content = json.loads(path.read_text())
        changed: Any = {
            "json": None,
            "version": {**content, "version": 99},
            "splits": {**content, "splits": {}},
            "list": [content],
            "missing": {key: value for key, value in content.items() if key != "vocab"},
            "type": {**content, "vocab": "many"},
            "range": {**content, "seq_len": 0},
            "negative": {**content, "splits": {**content["splits"], "train": {"tokens": -5, "documents": 1}}},
        }[damage]
        path.write_text("{" if changed is None else json.dumps(changed))
    with pytest.raises(InputError, match=r"bytes instead of|cannot be read|is no data manifest"):
        data.Manifest.open(folder)


def test_data_can_be_read_without_torch() -> None:
    script = "import sys; from meshwright import data, launch, run; assert 'torch' not in sys.modules"
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **paths}, check=True)


def test_no_manifest_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no data manifest"):
        data.Manifest.open(tmp_path)


def test_digits_are_real_images_in_batches(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    manifest = data.build_manifest(digits_job(), tmp_path / "manifest")
    assert manifest.samples + manifest.held_out_samples == 1797
    assert 0.1 < manifest.held_out_samples / 1797 < 0.3
    batch = manifest.batch(0, 0, 32, 8, 32)
    assert batch["inputs"].shape == (24, 8, 8) and batch["targets"].shape == (24,)
    assert batch["inputs"].min() >= 0 and batch["inputs"].max() == 1.0
    assert set(batch["targets"].tolist()) <= set(range(10))
    assert manifest.side_files() == {} and manifest.held_out_bytes(0, 8) == 0
    survey = data.survey(digits_job())
    assert (survey.documents, survey.samples, survey.held_out_samples) == (
        1797,
        manifest.samples,
        manifest.held_out_samples,
    )
    with pytest.raises(InputError, match=r"data\.held_out: is 0\.1, but the run began with 0.2"):
        data.build_manifest(digits_job(held_out=0.1), tmp_path / "manifest")
    with pytest.raises(InputError, match="no text"):
        manifest.text("train")


def test_digits_without_scikit_learn_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"needs scikit-learn; pip install 'meshwright\[images\]'"):
        data.build_manifest(digits_job(), tmp_path / "manifest")


def test_the_bigram_reference_is_that_of_the_formula(tmp_path: Path, source: Path) -> None:
    manifest = data.build_manifest(text_job(source), tmp_path / "manifest")
    train, held_out = manifest.text("train"), manifest.text("held_out")
    pairs, singles = Counter(pairwise(train)), Counter(train[:-1])
    cost = sum(-math.log2((pairs[a, b] + 1) / (singles[a] + 256)) for a, b in pairwise(held_out))
    assert data.bigram_bits_per_byte(train, held_out) == pytest.approx((8 + cost) / len(held_out))


def test_a_tokenizer_of_whole_words_still_accounts_for_every_byte(tmp_path: Path, source: Path) -> None:
    """Ids of such a tokenizer do not tell how many bytes they stand for; documents do."""
    words = {word: index for index, word in enumerate(["</s>", "[UNK]", "document", "says", "that", "times", "is"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    manifest = data.build_manifest(text_job(source, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "manifest")
    assert manifest.content["exact_bytes"] is False and manifest.tokenizer().eos == 0
    counted = manifest.held_out_bytes(0, manifest.held_out_samples)
    total = manifest.content["splits"]["held_out"]["bytes"]
    assert total - 20 < counted < total  # all but the share of the first token


def test_the_vocabulary_of_a_hugging_face_folder_is_its_configurations(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100}))
    model = ModelSection(hf=str(folder))
    assert corpus.model_vocab(model) == 100
    (folder / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json: is not valid JSON"):
        corpus.model_vocab(model)
