from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.errors import InputError, RunFailed
from meshwright.storage import open_store
from tests.stores import SECRET, Cable, S3Server

BUCKET = "s3://bucket"


def test_objects_are_written_listed_read_and_deleted(s3: S3Server) -> None:
    store = open_store(f"{BUCKET}/store")
    assert store.entries() == {}
    store.write("b/two.txt", b"two\n")
    store.write("a.txt", b"one\n" * 3)
    assert {name: entry.bytes for name, entry in store.entries().items()} == {"a.txt": 12, "b/two.txt": 4}
    assert list(store.entries("b")) == ["b/two.txt"]
    assert store.read("b/two.txt", 4) == b"two\n"
    with pytest.raises(InputError, match=r"s3://bucket/store/a\.txt: is more than the 11 bytes"):
        store.read("a.txt", 11)
    store.delete(["a.txt", "was/never/there"])
    assert list(store.entries()) == ["b/two.txt"]
    assert open_store(f"{BUCKET}/store/b/two.txt").is_object() and not open_store(f"{BUCKET}/store").is_object()


def test_names_are_taken_as_they_are_and_marks_of_folders_left_out(s3: S3Server) -> None:
    names = {"inner/ä b+c.txt": b"one", "plus%20.txt": b"two"}
    for name, data in {**names, "": b"", "inner/": b""}.items():
        s3.files().call_s3("put_object", Bucket="bucket", Key=f"marked/{name}", Body=data)
    store = open_store(f"{BUCKET}/marked/")
    assert {name: store.read(name, 9) for name in store.entries()} == names
    assert open_store(f"{BUCKET}/marked/inner/ä b+c.txt").is_object() and not store.is_object()


def test_a_stream_is_of_what_was_listed(s3: S3Server) -> None:
    store = open_store(f"{BUCKET}/streams")
    store.write("x", b"a line\n" * 1000)
    entry = store.entries()["x"]
    with store.open("x", entry) as file:
        assert file.readline() == b"a line\n"
        file.seek(3)
        assert file.read(5) == b"ine\na"
    store.write("x", b"b line\n" * 1000)  # of the same size
    with pytest.raises(InputError, match="s3://bucket/streams/x: was changed while it was read"):
        with store.open("x", entry):
            pass


def test_a_stream_does_not_go_on_in_another_object(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.storage.store.READ_BYTES", 1 << 10)
    store = open_store(f"{BUCKET}/streams")
    store.write("y", b"a" * (1 << 20))
    with pytest.raises((InputError, RunFailed), match="s3://bucket/streams/y"):
        with store.open("y", store.entries()["y"]) as file:
            assert file.read(1) == b"a"
            store.write("y", b"b" * (1 << 20))
            while data := file.read(1 << 12):
                assert b"b" not in data


def test_a_large_file_goes_in_parts_and_comes_back_whole(s3: S3Server, tmp_path: Path) -> None:
    store, large = open_store(f"{BUCKET}/large"), tmp_path / "large.bin"
    large.write_bytes(os.urandom(1 << 20) * 33)
    store.upload(large, "large.bin")
    entry = store.entries()["large.bin"]
    assert entry.bytes == 33 << 20
    assert entry.tag.endswith("-3")  # an S3 server's mark of an upload in three parts
    store.download("large.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == large.read_bytes()


@pytest.mark.parametrize("url", ["s3://no-such-bucket/x", f"{BUCKET}/nothing/here"])
def test_what_is_not_there_is_named(s3: S3Server, url: str) -> None:
    with pytest.raises(InputError, match=f"{url}: the store has no such object or bucket"):
        open_store(url).is_object()


def test_a_protocol_that_is_none_has_a_nearest() -> None:
    with pytest.raises(InputError, match="'s4' is no protocol of a store; known: abfs, file, gs, s3"):
        open_store("s4://bucket/x")


def test_a_package_that_is_missing_comes_with_its_command() -> None:
    script = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from meshwright.storage import open_store\n"
        "open_store('s3://bucket/x')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "InputError: s3://bucket/x: needs a package for s3 that is not installed" in done.stderr
    assert "pip install 'meshwright[s3]'" in done.stderr


def test_credentials_that_are_missing_are_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"s3://bucket/x/y: the store refuses these credentials: .*AWS_PROFILE"):
        open_store(f"{BUCKET}/x").write("y", b"z")


def test_no_secret_is_told(s3: S3Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG, logger="meshwright")
    cable = Cable(s3.port)
    s3.lead_here(monkeypatch, cable.port)
    cable.cut()
    try:
        with pytest.raises(RunFailed, match=r"s3://bucket/x/y: the store did not answer.*AWS_ENDPOINT_URL") as failed:
            open_store(f"{BUCKET}/x").write("y", b"z")
    finally:
        cable.close()
    assert SECRET not in str(failed.value) + caplog.text


def test_nothing_of_fsspec_is_loaded_before_a_store_is_opened() -> None:
    script = (
        "import sys, meshwright.storage, meshwright.data.sources, meshwright.job, meshwright.verbs.train\n"
        'sys.exit(f\'loaded: {set(sys.modules) & {"fsspec", "s3fs", "aiohttp"}}\' if \'fsspec\' in sys.modules else 0)'
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
