"""Sources in a store are what the same files on this machine are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright import data
from meshwright.data.sources import Document, open_source
from meshwright.errors import InputError
from meshwright.job import Job
from meshwright.storage import Store
from tests.stores import S3Server, s3_server

TEXT = "A first paragraph of words, with ä and ß.\n\nA second one.\n\nA third, which is also text.\n" * 40
RECORDS = "".join(json.dumps({"text": f"record {number} of the file"}) + "\n" for number in range(200))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as one:
        yield one


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    server.lead_here(monkeypatch)
    return server


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (folder / "inner" / "b.jsonl").write_text(RECORDS)
    (folder / ".hidden").write_text("not text of the corpus")
    (folder / "wide.txt").write_bytes("two bytes a letter".encode("utf-16"))
    return folder


def job(source: str | Path) -> Job:
    return Job(
        model={"family": "llama", "layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "vocab": 300},
        data={"source": str(source), "seq_len": 16, "tokenizer": "bytes", "held_out": 0.1},
        train={"steps": 2, "lr": 1e-3, "global_batch": 2},
    )


def put(server: S3Server, path: Path, name: str) -> str:
    server.files().put(str(path), f"bucket/{name}", recursive=path.is_dir())
    return f"s3://bucket/{name}"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("part", ["", "a.txt", pytest.param("inner/b.jsonl", marks=pytest.mark.slow)])
def test_a_source_in_a_store_is_the_one_on_this_machine(
    part: str, corpus: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.storage.store.READ_BYTES", 1 << 10)  # documents reach over blocks
    local, url = corpus / part, f"{put(s3, corpus, f'{len(part)}/corpus')}/{part}".rstrip("/")
    here, there = (
        [one.text for one in open_source(str(place), "text").documents() if isinstance(one, Document)]
        for place in (local, url)
    )
    assert here == there and len(there) > 1
    ours = data.build_manifest(job(local), tmp_path / "local")
    stored = data.build_manifest(job(url), tmp_path / "stored")
    assert files(tmp_path / "local") == files(tmp_path / "stored")
    assert ours.content["source"] == {key: stored.content["source"][key] for key in ("files", "bytes", "digest")}
    assert data.survey(job(url)) == data.survey(job(local))


def test_a_resume_compares_tags_and_reads_only_what_has_others(
    corpus: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(s3, corpus, "resumed")
    data.build_manifest(job(url), tmp_path / "manifest")
    read: list[str] = []
    opened = Store.open
    monkeypatch.setattr(Store, "open", lambda self, name, entry: (read.append(name), opened(self, name, entry))[1])
    data.build_manifest(job(url), tmp_path / "manifest")
    assert read == []
    large = s3.files().cat_file("bucket/resumed/a.txt")
    with s3.files().open("bucket/resumed/a.txt", "wb", block_size=5 << 20) as file:  # the same bytes in parts
        file.write(large)
        file.flush(force=True)
    before = (tmp_path / "manifest" / "manifest.json").read_bytes()
    data.build_manifest(job(url), tmp_path / "manifest")
    data.build_manifest(job(corpus), tmp_path / "manifest")  # moved to this machine
    assert (tmp_path / "manifest" / "manifest.json").read_bytes() == before
    s3.files().pipe_file("bucket/resumed/a.txt", large[:-2] + b"!\n")
    with pytest.raises(InputError, match=r"data\.source: 'resumed' is not what it was when the run began"):
        data.build_manifest(job(url), tmp_path / "manifest")
    assert "a.txt" in read


def test_a_source_that_is_gone_leaves_the_manifest(corpus: Path, s3: S3Server, tmp_path: Path) -> None:
    url = put(s3, corpus, "gone")
    samples = data.build_manifest(job(url), tmp_path / "manifest").samples
    s3.files().rm("bucket/gone", recursive=True)
    shutil.rmtree(corpus)
    assert data.build_manifest(job(url), tmp_path / "manifest").samples == samples


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://bucket/missing", "has no such object or bucket"),
        ("s3://bucket/kinds/a.bin", "no reader for 'a.bin'"),
        ("s3://no-such-bucket/a.txt", "has no such object or bucket"),
    ],
)
def test_what_cannot_be_a_source_is_named(url: str, what: str, s3: S3Server) -> None:
    s3.files().pipe_file("bucket/kinds/a.bin", b"text")
    with pytest.raises(InputError, match=what):
        data.survey(job(url))


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://example.org/a.txt", "is a web page.*save it to a file first"),
        ("s3://who:secret@bucket/a.txt", "holds a user and a password"),
        ("s3://", "names no place"),
    ],
)
def test_the_form_of_a_url_is_checked_with_the_job(url: str, what: str) -> None:
    with pytest.raises(InputError, match=rf"data\.source: .*{what}") as refused:
        job(url)
    assert "secret" not in str(refused.value)


def test_a_path_that_must_be_local_says_so() -> None:
    with pytest.raises(InputError, match=r"data\.tokenizer: is a URL where a path is needed"):
        Job(
            model={"family": "llama", "layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "vocab": 300},
            data={"source": "stdlib", "seq_len": 16, "tokenizer": "s3://bucket/tokenizer.json"},
            train={"steps": 2, "lr": 1e-3, "global_batch": 2},
        )
