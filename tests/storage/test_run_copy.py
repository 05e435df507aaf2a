"""A run's copy in a store: what counts, who may write, and what a cut or a race leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright import checkpoint, storage
from meshwright.errors import InputError, RunFailed
from meshwright.files import with_digest
from meshwright.run import HELD_NAME, RunFolder
from meshwright.storage import RunCopy, folders
from meshwright.storage.run_copy import newest_local, read_local
from tests.checkpoint.simulate import example_tensors, save_world, shapes_of, whole_pieces
from tests.stores import Cable, S3Server

JOB = {"job": {"train": {"steps": 3}}}


def save(run: RunFolder, step: int, keep: int = 9) -> Path:
    """A checkpoint in the run folder, by the real writer; its tensors depend on the step."""
    tensors = {name: tensor + step for name, tensor in example_tensors().items()}
    save_world(run.checkpoints, step, [whole_pieces(shapes_of(tensors))], tensors, keep=keep, meta=JOB)
    return run.checkpoints / f"step-{step}"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return new_run(tmp_path / "run")


def new_run(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.manifest.mkdir(parents=True)
    (run.manifest / "train.tokens.bin").write_bytes(b"\1\2" * 500)
    (run.manifest / "manifest.json").write_bytes(with_digest(b'{"kind": "text"}'))
    return run


@pytest.fixture
def url(s3: S3Server, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


@pytest.fixture(params=["s3", "file"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("url")) if request.param == "s3" else (tmp_path / "store").as_uri()


@pytest.fixture
def cable(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    one = Cable(s3.port)
    s3.lead_here(monkeypatch, one.port)
    yield one
    one.close()


def events(run: RunFolder) -> list[dict[str, object]]:
    return [event for event in run.read_events() if event["event"] == "upload"]


def steps(url: str) -> list[int]:
    return [one.about["step"] for one in RunCopy(url).checkpoints()]


def test_a_run_is_kept_and_brought_back(run: RunFolder, any_url: str, tmp_path: Path) -> None:
    url = any_url
    save(run, 1)
    with storage.kept_in_store(url, run, 2, new=True):
        save(run, 2)
    assert steps(url)[-1] == 2
    assert events(run)[-1].items() >= {"step": 2}.items()
    fresh = RunFolder(tmp_path / "fresh").create()
    assert storage.bring_back(url, fresh) == JOB
    folder = checkpoint.latest(fresh.checkpoints)
    assert folder is not None and folder.name == "step-2"
    checkpoint.check(folder)
    assert (fresh.manifest / "train.tokens.bin").read_bytes() == b"\1\2" * 500
    assert storage.bring_back(url, fresh) is None  # nothing newer is there
    fresh.write_job("")
    with storage.kept_in_store(url, fresh, 2, new=False):
        save(fresh, 3)
    assert steps(url) == [2, 3]


def test_only_the_newest_stay(run: RunFolder, url: str) -> None:
    copy = RunCopy(url)
    copy.take(run, new=True)
    for step in (5, 9, 7):  # the run went back after 9: what counts is the order of commits
        copy.send_checkpoint(read_local(save(run, step)), keep=2)
    assert steps(url) == [9, 7]
    assert not [name for name in copy.store.entries() if "step-5" in name]


def test_a_new_run_is_refused_where_one_is(run: RunFolder, url: str, tmp_path: Path) -> None:
    save(run, 4)
    with storage.kept_in_store(url, run, 2, new=True):
        pass
    with pytest.raises(InputError, match="holds a run already, at step 4; to resume it: --resume"):
        with storage.kept_in_store(url, run, 2, new=True):
            pass
    other = new_run(tmp_path / "other")
    other.write_job("")
    for use in (
        lambda: RunCopy(url).take(other, new=False),
        lambda: storage.bring_back(url, other),
    ):
        with pytest.raises(InputError, match="holds another run than"):
            use()


def test_what_is_cut_off_does_not_count_and_is_sent_again(run: RunFolder, url: str, cable: Cable) -> None:
    copy = RunCopy(url)
    copy.take(run, new=True)
    copy.send_checkpoint(read_local(save(run, 1)), keep=2)
    newest = read_local(save(run, 2))
    cable.cut(after_bytes=6000)  # some of its files are over by then
    with pytest.raises(RunFailed, match=rf"{url}/checkpoints/step-2\S*: the store did not answer"):
        copy.send_checkpoint(newest, keep=2)
    assert cable.is_cut
    cable.mend()
    found, unfinished = folders.committed(copy.store, "checkpoints")
    assert ([one.about["step"] for one in found], len(unfinished)) == ([1], 1)
    assert checkpoint.latest(run.checkpoints) == run.checkpoints / "step-2"  # the local one is untouched
    copy.send_checkpoint(read_local(save(run, 3)), keep=2)
    assert steps(url) == [1, 3]
    assert folders.committed(copy.store, "checkpoints")[1] == []  # what was cut off is gone


def test_an_upload_that_fails_is_an_event_and_an_error_at_the_end(run: RunFolder, url: str, cable: Cable) -> None:
    save(run, 1)
    with pytest.raises(RunFailed, match="the newest checkpoint is in the run folder and not in the store"):
        with storage.kept_in_store(url, run, 2, new=True):
            cable.cut()
    assert "did not answer" in str(events(run)[-1]["error"])
    checkpoint.check(run.checkpoints / "step-1")
    cable.mend()
    with storage.kept_in_store(url, run, 2, new=False):  # as a resume does
        pass
    assert steps(url) == [1]


def test_two_that_send_the_same_do_not_harm_it(run: RunFolder, url: str, tmp_path: Path) -> None:
    newest = read_local(save(run, 1))
    copy = RunCopy(url)
    copy.take(run, new=True)
    copy.send_data(run.manifest)
    threads = [threading.Thread(target=copy.send_checkpoint, args=(newest, 2)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = RunFolder(tmp_path / "fresh").create()
    storage.bring_back(url, fresh)
    checkpoint.check(fresh.checkpoints / "step-1")


def test_one_that_was_replaced_sends_nothing_more(run: RunFolder, url: str, tmp_path: Path) -> None:
    first = RunCopy(url)
    first.take(run, new=True)
    first.send_data(run.manifest)
    first.send_checkpoint(read_local(save(run, 1)), keep=2)
    fresh = RunFolder(tmp_path / "fresh").create()
    storage.bring_back(url, fresh)
    second = RunCopy(url)
    second.take(fresh, new=False)
    with pytest.raises(RunFailed, match=r"process \d+ on .* has this run now; nothing more is sent from here"):
        first.send_checkpoint(read_local(save(run, 2)), keep=2)
    assert steps(url) == [1]
    second.send_checkpoint(read_local(save(fresh, 3)), keep=2)
    assert steps(url) == [1, 3]
    assert folders.committed(second.store, "checkpoints")[1] == []


@pytest.mark.parametrize(
    "short", [pytest.param(True, id="one byte short"), pytest.param(False, id="one byte other", marks=pytest.mark.slow)]
)
def test_a_damaged_object_is_refused_by_name(
    run: RunFolder, url: str, server: S3Server, tmp_path: Path, short: bool
) -> None:
    copy = RunCopy(url)
    copy.take(run, new=True)
    copy.send_data(run.manifest)
    older = copy.send_checkpoint(read_local(save(run, 1)), keep=2)
    newest = copy.send_checkpoint(read_local(save(run, 2)), keep=2)
    path = f"bucket/{url.removeprefix('s3://bucket/')}/{newest.name}/model/model.safetensors"
    data = server.files().cat_file(path)
    server.files().pipe_file(path, data[:-1] if short else data[:-1] + bytes([data[-1] ^ 1]))
    fresh = RunFolder(tmp_path / "fresh").create()
    with pytest.raises(InputError) as refused:
        storage.bring_back(url, fresh)
    words = str(refused.value)
    assert (
        f"s3://{path}" in words and f"{url}/{older.name} is whole" in words and f"delete {url}/{newest.name}" in words
    )
    assert checkpoint.latest(fresh.checkpoints) is None
    folders.remove(copy.store, newest.name)
    storage.bring_back(url, fresh)
    assert newest_local(fresh.checkpoints) == read_local(fresh.checkpoints / "step-1")


def test_damage_in_the_store_does_not_keep_the_next_from_it(run: RunFolder, url: str) -> None:
    copy = RunCopy(url)
    save(run, 1)
    with storage.kept_in_store(url, run, 2, new=True):
        while not events(run):
            time.sleep(0.01)
        copy.store.delete([f"{read_local(run.checkpoints / 'step-1').name}/model/model.safetensors"])
        with pytest.raises(InputError, match="is missing, though its list names it; to go on without it, delete"):
            copy.checkpoints()
        save(run, 2)
    assert steps(url) == [2]


def test_a_list_without_a_step_is_no_checkpoint(run: RunFolder, url: str, tmp_path: Path) -> None:
    copy = RunCopy(url)
    (tmp_path / "x").write_bytes(b"x")
    folders.send(copy.store, "checkpoints/step-9-0", tmp_path, ["x"], {"step": "9"})
    with pytest.raises(InputError, match="step-9-0: is no checkpoint: its list has no step and sequence; to go on"):
        copy.checkpoints()


def test_a_damaged_one_of_the_folder_comes_back_from_the_store(run: RunFolder, url: str) -> None:
    save(run, 1)
    with storage.kept_in_store(url, run, 2, new=True):
        save(run, 2)
    run.write_job("")
    manifest = run.checkpoints / "step-2" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert storage.bring_back(url, run) == JOB
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None and newest.name == "step-2"
    checkpoint.check(newest)


def test_a_folder_with_other_data_is_refused(run: RunFolder, url: str, tmp_path: Path) -> None:
    with storage.kept_in_store(url, run, 2, new=True):
        save(run, 1)
    other = new_run(tmp_path / "other")
    (other.manifest / "manifest.json").write_bytes(with_digest(b'{"kind": "rows"}'))
    with pytest.raises(InputError, match="other/manifest: holds other data than the run at s3://"):
        storage.bring_back(url, other)


def test_a_checkpoint_that_is_being_sent_is_not_deleted(run: RunFolder) -> None:
    held = save(run, 1) / HELD_NAME
    held.touch()
    for step in (2, 3):
        save(run, step, keep=1)
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-1", "step-3"]
    held.unlink()
    save(run, 4, keep=1)
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-4"]


def test_a_mark_of_a_process_that_died_is_taken_away(run: RunFolder) -> None:
    held = save(run, 1) / HELD_NAME
    held.touch()
    with storage.kept_in_store(None, run, 2, new=False):
        assert not held.exists()
