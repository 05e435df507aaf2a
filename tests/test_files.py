"""Files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.data.sources import Document, open_source
from meshwright.errors import InputError
from meshwright.files import read_object, write_atomic
from meshwright.job.file import read_values

#: What a text begins with, how its characters are encoded -> what is said about it; "" if it is read.
ENCODINGS = {
    "utf-8": "",
    "utf-8-sig": "",
    "utf-16": "UTF-16",
    "utf-16-be": "NUL bytes",
    "utf-16-le": "NUL bytes",
    "utf-32": "UTF-16",
    "utf-32-be": "NUL bytes",
}


@pytest.mark.parametrize(("encoding", "said"), ENCODINGS.items())
def test_text_from_outside_has_one_reader(tmp_path: Path, encoding: str, said: str) -> None:
    def read_job(path: Path) -> object:
        return read_values(path).sections["train"]["steps"]

    def read_data(path: Path) -> object:
        (one,) = open_source(str(path), "text").documents()
        if not isinstance(one, Document):
            raise InputError(one.problem)
        return one.text

    for name, text, read, value in (
        ("job.toml", "[train]\nsteps = 7\n", read_job, 7),
        ("config.json", '{"a": 7}', lambda path: read_object(path, 100)["a"], 7),
        ("text.txt", "some words", read_data, "some words"),
        ("text.jsonl", '{"text": "é"}', read_data, "é"),
    ):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        if said:
            with pytest.raises(InputError, match=said):
                read(path)
        else:
            assert read(path) == value, name


def test_a_key_given_twice_is_refused_everywhere(tmp_path: Path) -> None:
    for name in ("config.json", "text.jsonl"):
        (tmp_path / name).write_text('{"text": "one", "text": "two"}')
    with pytest.raises(InputError, match="'text' is given twice"):
        read_object(tmp_path / "config.json", 100)
    (record,) = open_source(str(tmp_path / "text.jsonl"), "text").documents()
    assert not isinstance(record, Document) and record.broken and "'text' is given twice" in record.problem.what


def test_write_atomic_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"one", mode=0o600)
    write_atomic(path, b"two", mode=0o600, durable=False)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").touch()
    with pytest.raises(OSError):
        write_atomic(folder, b"a file cannot replace a folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "folder"]
