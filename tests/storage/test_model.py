from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.errors import InputError
from meshwright.storage import folders, local_model, open_store
from tests.storage.test_folders import contents, written
from tests.stores import S3Server

MODEL = {"config.json": b"{}", "model.safetensors": b"weights" * 100, "tokenizer.json": b"[]"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "meshwright" / "models"


def send(url: str, source: Path, step: int, model: dict[str, bytes]) -> str:
    files = {f"model/{name}": data for name, data in model.items()} | {"state/rank-0.safetensors": b"moments"}
    name = f"checkpoints/step-{step}-{step:016x}"
    folders.send(open_store(url), name, written(source, files), files, {"step": step, "sequence": step})
    return f"{url}/{name}"


def test_a_path_is_what_it_is() -> None:
    assert local_model("runs/job") == Path("runs/job")


def test_the_newest_checkpoint_of_a_run_comes_without_its_state(s3: S3Server, tmp_path: Path, cache: Path) -> None:
    url = "s3://bucket/model/run"
    older = send(url, tmp_path / "1", 1, MODEL)
    send(url, tmp_path / "2", 2, {**MODEL, "config.json": b'{"of": 2}'})
    assert contents(local_model(url)) == {**MODEL, "config.json": b'{"of": 2}'}
    assert contents(local_model(older)) == MODEL
    assert local_model(url).name == local_model(older).name == "run"  # under which it is served
    assert len(list(cache.iterdir())) == 2  # and no draft
    s3.files().rm("bucket/model/run/checkpoints", recursive=True)
    with pytest.raises(InputError, match=r"holds no model: no config\.json; name the copy of a run"):
        local_model(url)


def test_the_cache_is_held_to_its_digests(
    s3: S3Server, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = send("s3://bucket/model/cached", tmp_path / "1", 1, MODEL)
    model = local_model(url)
    written_at = (model / "config.json").stat().st_mtime_ns
    assert local_model(url) == model and (model / "config.json").stat().st_mtime_ns == written_at  # not fetched again
    (model / "model.safetensors").write_bytes(b"weighty" * 100)
    assert contents(local_model(url)) == MODEL
    assert "was changed or damaged since; it is downloaded again" in caplog.text


def test_a_hugging_face_folder_comes_without_code_and_pickles(s3: S3Server, tmp_path: Path) -> None:
    url = "s3://bucket/model/hf"
    strange = {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "inner/config.json": b"{}"}
    s3.files().put(str(written(tmp_path / "hf", MODEL | strange)), "bucket/model/hf", recursive=True)
    first = local_model(url)
    assert contents(first) == MODEL
    s3.files().pipe_file("bucket/model/hf/config.json", b'{"changed": 1}')
    assert contents(local_model(url)) == {**MODEL, "config.json": b'{"changed": 1}'}
    assert contents(first) == MODEL  # whoever uses the older one keeps it


def test_a_damaged_checkpoint_is_not_served(s3: S3Server, tmp_path: Path, cache: Path) -> None:
    url = send("s3://bucket/model/damaged", tmp_path / "1", 1, MODEL)
    s3.files().pipe_file(f"{url.removeprefix('s3://')}/model/model.safetensors", b"weighty" * 100)
    with pytest.raises(InputError, match=rf"{url}/model/model\.safetensors: does not have the digest"):
        local_model(url)
    assert list(cache.iterdir()) == []
