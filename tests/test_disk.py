"""The two disks do the same: this machine's own, and that of the driver, reached through the hub."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright.disk import OWN_DISK, Disk, require
from meshwright.errors import InputError
from meshwright.launch import hub_disk
from tests.launch.elsewhere import elsewhere

CAP = 1 << 20


@pytest.fixture(params=["own", "through the hub"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(hub_disk, "CHUNK_BYTES", 1000)  # so that small files take several messages
    with elsewhere(tmp_path / "run") as hub:
        yield OWN_DISK if request.param == "own" else hub.disk()


@pytest.fixture
def lease(tmp_path: Path, disk: Disk) -> Path:
    return tmp_path / "run" / "checkpoints" / ".saving-1"


def test_files_are_written_whole_read_and_removed(disk: Disk, lease: Path) -> None:
    for size in (0, 1, 1000, 1001, 5000):
        data = bytes(number % 251 for number in range(size))
        disk.write(lease / "file", data, durable=size % 2 == 0)
        assert disk.read(lease / "file", CAP) == data == (lease / "file").read_bytes()
    assert [path.name for path in lease.iterdir()] == ["file"]  # no draft is left
    with pytest.raises(InputError, match=r"file.*4999"):
        disk.read(lease / "file", 4999)
    for _ in range(2):
        disk.remove(lease / "file")
    assert disk.read(lease / "file", CAP) is None and disk.entry(lease / "file") is None


def test_pieces_go_to_their_places(disk: Disk, lease: Path) -> None:
    disk.write(lease / "file", b"header", durable=False)
    disk.resize(lease / "file", 9000)
    pieces = [(6, b"abc"), (2000, bytes(range(256)) * 14), (8999, b"z"), (100, b"")]
    disk.write_at(lease / "file", iter([(offset, memoryview(data)) for offset, data in pieces]))
    expected = bytearray(9000)
    for offset, data in [(0, b"header"), *pieces]:
        expected[offset : offset + len(data)] = data
    assert (lease / "file").read_bytes() == expected
    disk.write_at(lease / "file", [])
    disk.resize(lease / "file", 3)
    assert disk.read(lease / "file", CAP) == b"hea"


def test_folders_are_made_listed_renamed_and_removed(disk: Disk, lease: Path) -> None:
    for _ in range(2):
        disk.make_folder(lease / "step-1.partial-ab")
    disk.write(lease / "step-1.partial-ab" / "file", b"12345")
    (lease / "step-1.partial-ab" / "link").symlink_to("file")
    disk.sync(lease / "step-1.partial-ab")
    found = disk.entries(lease / "step-1.partial-ab")
    assert [(name, one.is_folder, one.bytes) for name, one in found.items()] == [("file", False, 5)]
    assert found["file"].changed_ns == (lease / "step-1.partial-ab" / "file").stat().st_mtime_ns
    committed = lease.parent / "step-1"
    disk.rename(lease / "step-1.partial-ab", committed)
    disk.sync(lease.parent)
    assert disk.entries(lease) == {} and disk.entries(lease / "nothing") == {}
    assert [(name, one.is_folder) for name, one in disk.entries(lease.parent).items()] == [
        (".saving-1", True),
        ("step-1", True),
    ]
    disk.remove(committed)
    assert not committed.exists() and disk.entries(committed) == {}


def test_what_cannot_be_done_is_the_systems_error_and_names_the_path(disk: Disk, lease: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        disk.write_at(lease / "missing", [(0, b"a")])
    with pytest.raises(FileNotFoundError, match="missing"):
        disk.resize(lease / "missing", 1)
    with pytest.raises(FileNotFoundError, match="missing"):
        disk.write(lease / "missing" / "file", b"a")
    with pytest.raises(FileNotFoundError, match="missing"):
        disk.make_folder(lease / "missing" / "folder")
    with pytest.raises(FileNotFoundError, match="missing"):
        disk.rename(lease / "missing", lease / "other")
    with pytest.raises(FileNotFoundError, match="missing"):
        require(disk, lease / "missing")
    disk.make_folder(lease / "folder")
    require(disk, lease / "folder")
    with pytest.raises(InputError, match="folder: is not a regular file"):
        disk.read(lease / "folder", CAP)
    with pytest.raises(OSError, match="folder") as caught:
        disk.write_at(lease / "folder", [(0, b"a")])
    assert caught.value.errno == errno.EISDIR
