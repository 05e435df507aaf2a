"""Files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.files import write_atomic


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
