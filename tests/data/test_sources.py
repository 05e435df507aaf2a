from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.data import sources
from meshwright.data.sources import Document, Unreadable, open_source
from meshwright.errors import InputError


def texts(path: Path, text_key: str = "text") -> list[str]:
    return [found.text for found in open_source(str(path), text_key).documents() if isinstance(found, Document)]


def test_the_standard_library_is_a_corpus_of_ten_to_twenty_megabytes() -> None:
    source = open_source("stdlib", "text")
    names = [name for name, _, _ in source.files]
    assert names == sorted(names) and "json/decoder.py" in names
    assert not any("site-packages" in name or "/test" in f"/{name}" for name in names)
    assert 5e6 < source.total_bytes() < 2e7
    assert source.fingerprint() == open_source("stdlib", "text").fingerprint()
    first = next(iter(source.documents()))
    assert isinstance(first, Document) and first.where == names[0]


def test_blank_lines_divide_a_txt_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n\none\nstill one\n \t\r\ntwö\n\n\n\nthree".encode())
    found = list(open_source(str(path), "text").documents())
    assert found == [
        Document("a.txt:3", "one\nstill one\n"),
        Document("a.txt:6", "twö\n"),
        Document("a.txt:10", "three"),
    ]


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff\n\r\x1c\x1d\x1e\x85\x0b\x0c"), min_size=1),
        max_size=5,
    )
)
def test_no_text_is_lost_wherever_a_long_document_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    kept = [line for line in lines if line.encode().strip()]
    content = "\n".join(kept)
    for name in ("a.txt", "whole.md"):
        (folder / name).write_text(content, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "DOCUMENT_BYTES", 7)
        assert "".join(texts(folder / "a.txt")) == content
        (folder / "a.txt").unlink()
        whole = texts(folder)
    assert "".join(whole) == content
    assert all(len(text.encode()) <= 7 for text in whole)


def test_bad_lines_of_a_jsonl_file_are_named_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{not json",
        b"",
        b'["a list"]',
        b'{"text": 7}',
        b'{"txt": "misspelt", "n": 1}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 900,
        b'{"text": "' + b"x" * 5000 + b'"}',
        b'{"text": null}',
        b'{"text": "good again"}',
    ]
    path.write_bytes(b"\n".join(lines))
    found = list(open_source(str(path), "text").documents())
    assert [d.text for d in found if isinstance(d, Document)] == ["good", "good again"]
    bad = {int(u.problem.where.split(":")[1]): u.problem.what for u in found if isinstance(u, Unreadable) and u.broken}
    assert sorted(bad) == [2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert bad[5] == "'text' is not text" and bad[6] == "has no 'text'" and "longer than" in bad[10]
    assert "surrogate" in bad[7]
    (misspelt,) = [u for u in found if isinstance(u, Unreadable) and u.problem.where == "a.jsonl:6"]
    assert "txt, n" in misspelt.problem.nearest


def test_the_text_key_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "hello", "text": "no"}) + "\n")
    assert texts(path, "body") == ["hello"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("one\n\nwhole")
    (tmp_path / "a.jsonl").write_text('{"text": "record"}\n')
    (tmp_path / "sub" / "c.py").write_text("code")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "sub" / "latin.txt").write_bytes(b"caf\xe9")
    found = list(open_source(str(tmp_path), "text").documents())
    assert found[:3] == [
        Document("a.jsonl:1", "record"),
        Document("b.txt", "one\n\nwhole"),
        Document("sub/c.py", "code"),
    ]
    assert isinstance(found[3], Unreadable) and not found[3].broken
    assert "sub/latin.txt: is not UTF-8 from byte 3" in str(found[3].problem)


def test_the_fingerprint_changes_with_names_sizes_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = open_source(str(tmp_path), "text").fingerprint()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = open_source(str(tmp_path), "text").fingerprint()
    (tmp_path / "b.txt").write_text("once")
    assert len({json.dumps(f) for f in (before, renamed, open_source(str(tmp_path), "text").fingerprint())}) == 3


@pytest.mark.parametrize("source", ["-", "/dev/stdin", "/proc/self/fd/0"])
def test_streams_cannot_be_indexed(source: str) -> None:
    with pytest.raises(InputError, match=r"cannot be indexed.*save it to a file first"):
        open_source(source, "text")


def test_pipes_and_sockets_cannot_be_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="cannot be indexed"):
        open_source(str(tmp_path / "pipe.txt"), "text")
    with pytest.raises(InputError, match="cannot be indexed"):
        open_source(str(tmp_path), "text")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.txt")
        with pytest.raises(InputError, match="cannot be indexed"):
            open_source("s.txt", "text")


def test_what_is_missing_or_has_no_reader_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "empty").mkdir()
    for source, words in [
        (tmp_path / "no.txt", "No such file"),
        (tmp_path / "a.pdf", "no reader for 'a.pdf'"),
        (tmp_path / "empty", "no file in the folder"),
        ("nul\0byte.txt", "null byte"),
    ]:
        with pytest.raises(InputError, match=words):
            open_source(str(source), "text")
