from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError, RunFailed
from meshwright.files import with_digest
from meshwright.storage import folders, open_store
from tests.stores import S3Server

FILES = {"a.bin": bytes(range(256)) * 8, "within/b.bin": b"b" * 1000, "empty": b""}


def written(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_goes_and_comes_back(s3: S3Server, tmp_path: Path) -> None:
    store = open_store("s3://bucket/folders")
    sent = folders.send(store, "here/one", written(tmp_path / "from"), FILES, {"step": 3})
    assert sent.bytes == sum(map(len, FILES.values()))
    (found,), unfinished = folders.committed(store, "here")
    assert (found, unfinished) == (sent, [])
    folders.fetch(store, found, tmp_path / "to")
    assert contents(tmp_path / "to") == FILES
    folders.fetch(store, found, tmp_path / "part", "within/")
    assert list(contents(tmp_path / "part")) == ["within/b.bin"]
    assert folders.read_folder(open_store("s3://bucket/folders/here/one"), "", open_store(
        "s3://bucket/folders/here/one").entries()).digest == sent.digest  # fmt: skip
    folders.remove(store, "here/one")
    assert folders.committed(store, "here") == ([], [])


def test_a_folder_without_its_list_is_not_there(s3: S3Server, tmp_path: Path) -> None:
    store = open_store("s3://bucket/half")

    def stop() -> None:
        raise RunFailed("the list may not be written")

    with pytest.raises(RunFailed, match="may not be written"):
        folders.send(store, "here/one", written(tmp_path), FILES, {}, stop)
    assert len(store.entries()) == len(FILES)
    assert folders.committed(store, "here") == ([], ["here/one"])


def test_a_sender_killed_amid_a_large_file_leaves_nothing_that_counts(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(os.urandom(1 << 20) * 101)
    script = (
        "import sys; from pathlib import Path; from meshwright.storage import folders, open_store\n"
        "folders.send(open_store('s3://bucket/killed'), 'here/one', Path(sys.argv[1]), ['large.bin'], {})\n"
    )
    sender = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        while "Uploads" not in s3.files().call_s3("list_multipart_uploads", Bucket="bucket", Prefix="killed"):
            assert sender.poll() is None, "it was over before it could be killed"
    finally:
        sender.kill()
        sender.wait()
    store = open_store("s3://bucket/killed")
    assert store.entries() == {}
    folders.send(store, "here/one", tmp_path, ["large.bin"], {})
    ((found,), unfinished) = folders.committed(store, "here")
    assert (found.fault, unfinished) == (None, [])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: list[Callable[[Path], None]] = [_cut, _flip, Path.unlink, lambda path: path.write_bytes(b"other")]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.bin", "within/b.bin", folders.LIST_NAME]), damage=st.sampled_from(DAMAGES))
def test_no_damage_comes_through(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Whatever happens to an object of a folder, fetching it fails or the folder is not there at all."""
    place = tmp_path / "store"
    shutil.rmtree(tmp_path, ignore_errors=True)
    store = open_store(place.as_uri())
    folders.send(store, "one", written(tmp_path / "from"), FILES, {})
    damage(place / "one" / name)
    found, unfinished = folders.committed(store)
    if not found:
        assert (name, unfinished) == (folders.LIST_NAME, ["one"])
        return
    with pytest.raises(InputError, match=f"store/one/{name}"):
        if found[0].fault is not None:
            raise InputError(found[0].fault)
        folders.fetch(store, found[0], tmp_path / "to")


@pytest.mark.parametrize(
    "objects",
    [
        {"../outside": {"bytes": 1, "sha256": "0" * 64}},
        {"/outside": {"bytes": 1, "sha256": "0" * 64}},
        {"a//b": {"bytes": 1, "sha256": "0" * 64}},
        {"a\\b": {"bytes": 1, "sha256": "0" * 64}},
        {"a": {"bytes": True, "sha256": "0" * 64}},
        {"a": {"bytes": 1, "sha256": "0" * 63}},
        {"a": 1},
        [],
    ],
)
def test_a_list_that_is_not_ours_is_refused(objects: object, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    record = {"version": folders.VERSION, "about": {}, "objects": objects}
    store.write(f"one/{folders.LIST_NAME}", with_digest(json.dumps(record).encode()))
    ((found,), _) = folders.committed(store)
    assert found.fault is not None and "is not a list of objects" in found.fault.what
