"""What ranks of nodes without the run folder's disk may do in it, and what nobody may."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshwright.disk import Piece
from meshwright.errors import RunFailed
from meshwright.launch import hub_disk
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.run_files import MAX_BYTES
from meshwright.launch.service import connect
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.launch.wire.hub_pb2_grpc import HubStub
from tests.launch.elsewhere import Elsewhere, elsewhere

Read, Write = wire.ReadRequest, wire.WriteRequest
LEASE = "checkpoints/.saving-1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Elsewhere]:
    with elsewhere(tmp_path / "run") as one:
        (tmp_path / "secret").write_text("not of the run")
        (one.run.path / "job.toml").write_text("the job")
        (one.run.path / "link").symlink_to(tmp_path / "secret")
        one.run.manifest.symlink_to(tmp_path)
        (one.run.lease(1) / "link").symlink_to(tmp_path / "secret")
        (one.run.lease(1) / "folder-link").symlink_to(tmp_path)
        (one.run.lease(1) / "mine").write_text("mine")
        for name in ("step-1", ".saving-7"):
            (one.run.checkpoints / name / "model").mkdir(parents=True)
            (one.run.checkpoints / name / "model" / "file").write_text("kept")
        yield one


def ask(files: HubFiles, request: Any, generation: str = "1", secret: str | None = None) -> Any:
    """The answer to a request as it is. Raises grpc.RpcError."""
    stub = HubStub(connect(files.local.address, ""))
    method = stub.Read if isinstance(request, Read) else stub.Write
    metadata = [("secret", files.local.secret if secret is None else secret), ("generation", generation)]
    return method(request, metadata=metadata, timeout=20, wait_for_ready=True)


def refusal(files: HubFiles, request: Any, **options: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask(files, request, **options)
    return caught.value.code(), caught.value.details()


HOSTILE = {
    "../secret": "no path in the run folder",
    f"{LEASE}/../../../secret": "no path in the run folder",
    "/etc/hostname": "no path in the run folder",
    "": "no path in the run folder",
    ".": "no path in the run folder",
    f"{LEASE}//mine": "no path in the run folder",
    f"{LEASE}/mine/": "no path in the run folder",
    f"{LEASE}/a\0b": "no path in the run folder",
    f"{LEASE}/{'a' * 300}": "no path in the run folder",
    "hub": "not for ranks",
    "hub/access.json": "not for ranks",
    "launch/secret.yaml": "not for ranks",
    "logs/rank-0.log": "not for ranks",
    "events.jsonl": "not for ranks",
    ".lock": "not for ranks",
    f"{LEASE}/../../hub/access.json": "no path in the run folder",
    "link": "not for ranks",
    "manifest": "leads through a link",
    "manifest/secret": "leads through a link",
    f"{LEASE}/link": "leads through a link",
    f"{LEASE}/folder-link/secret": "leads through a link",
}


@pytest.mark.parametrize(("path", "words"), HOSTILE.items())
def test_paths_that_lead_out_or_to_secrets_are_refused(hub: Elsewhere, tmp_path: Path, path: str, words: str) -> None:
    """Whatever is asked, also as the target of a renaming."""
    for read in Read.Operation.values():
        assert refusal(hub.files, Read(operation=read, path=path, count=100)) == (
            grpc.StatusCode.PERMISSION_DENIED,
            AnyWith(words),
        )
    piece = [wire.FilePiece(data=b"overwritten")]
    for write in Write.Operation.values():
        request = Write(operation=write, path=path, target=f"{LEASE}/new", pieces=piece)
        assert refusal(hub.files, request) == (grpc.StatusCode.PERMISSION_DENIED, AnyWith(words))
    request = Write(operation=Write.RENAME, path=f"{LEASE}/mine", target=path)
    assert refusal(hub.files, request) == (grpc.StatusCode.PERMISSION_DENIED, AnyWith(words))
    assert (tmp_path / "secret").read_text() == "not of the run"
    assert (hub.run.lease(1) / "mine").read_text() == "mine"


class AnyWith:
    """Equal to every text that holds `words`."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.words in other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"...{self.words}..."


def test_job_and_checkpoints_can_be_read(hub: Elsewhere) -> None:
    reply = ask(hub.files, Read(operation=Read.CONTENT, path="job.toml", offset=4, count=100))
    assert reply.content == b"job" and reply.entries[0].bytes == 7
    assert ask(hub.files, Read(operation=Read.CONTENT, path="checkpoints/step-1/model/file", count=2)).content == b"ke"


@pytest.mark.parametrize(
    "path",
    ["job.toml", "plan.json", "checkpoints", LEASE, "checkpoints/step-1/model/file", "checkpoints/.saving-7/new"],
)
def test_only_the_lease_of_ones_own_generation_is_written(hub: Elsewhere, path: str) -> None:
    before = sorted((str(one), one.read_bytes() if one.is_file() else b"") for one in hub.run.path.rglob("*"))
    for write in (Write.WRITE, Write.RESIZE, Write.WRITE_AT, Write.MAKE_FOLDER, Write.REMOVE, Write.RENAME):
        request = Write(operation=write, path=path, target=f"{LEASE}/new", pieces=[wire.FilePiece(data=b"x")])
        code, words = refusal(hub.files, request)
        assert code == grpc.StatusCode.PERMISSION_DENIED and "the folder of generation 1" in words
    assert sorted((str(one), one.read_bytes() if one.is_file() else b"") for one in hub.run.path.rglob("*")) == before


def test_a_folder_of_the_lease_gets_the_name_of_a_checkpoint_and_no_other(hub: Elsewhere) -> None:
    (hub.run.lease(1) / "step-2.partial-ab").mkdir()
    partial = f"{LEASE}/step-2.partial-ab"
    for target in (
        "job.toml",
        "plan.json",
        "checkpoints/other",
        "checkpoints/.saving-7/new",
        "checkpoints/step-1/model/file",
    ):
        code, words = refusal(hub.files, Write(operation=Write.RENAME, path=partial, target=target))
        assert code == grpc.StatusCode.PERMISSION_DENIED and "no name of a checkpoint" in words
    request = Write(operation=Write.RENAME, path="checkpoints/step-1", target=f"{LEASE}/step-1")
    assert refusal(hub.files, request)[0] == grpc.StatusCode.PERMISSION_DENIED  # nothing comes back into a lease
    assert not ask(
        hub.files, Write(operation=Write.RENAME, path=partial, target="checkpoints/step-2", id=9)
    ).fault.errno
    assert (hub.run.checkpoints / "step-2").is_dir()


def test_a_renaming_whose_answer_was_lost_is_done_once(hub: Elsewhere) -> None:
    requests = [
        Write(operation=Write.RENAME, path=f"{LEASE}/mine", target=f"{LEASE}/other", id=number) for number in (5, 5, 6)
    ]
    assert [bool(ask(hub.files, request).fault.errno) for request in requests] == [False, False, True]
    requests[0].id = 0
    assert refusal(hub.files, requests[0]) == (grpc.StatusCode.PERMISSION_DENIED, "a renaming without an id")


def test_the_secret_and_the_generation_are_needed(hub: Elsewhere) -> None:
    read, write = Read(path="job.toml"), Write(path=f"{LEASE}/new", pieces=[wire.FilePiece(data=b"x")])
    access = hub.files.hub.access
    for request in (read, write):
        for secret in ("", "wrong", access.read, access.act):
            assert refusal(hub.files, request, secret=secret)[0] == grpc.StatusCode.UNAUTHENTICATED
        for generation in ("0", "2", "", "7"):
            assert refusal(hub.files, request, generation=generation)[0] == grpc.StatusCode.FAILED_PRECONDITION
    assert not (hub.run.lease(1) / "new").exists()


def test_more_than_a_message_may_carry_is_refused(hub: Elsewhere) -> None:
    read = Read(operation=Read.CONTENT, path="job.toml", count=MAX_BYTES + 1)
    write = Write(path=f"{LEASE}/new", pieces=[wire.FilePiece(data=bytes(MAX_BYTES)), wire.FilePiece(data=b"x")])
    for request in (read, write):
        code, words = refusal(hub.files, request)
        assert code == grpc.StatusCode.PERMISSION_DENIED and str(MAX_BYTES) in words
    assert not (hub.run.lease(1) / "new").exists()


def test_offsets_and_sizes_that_no_file_has_are_errors(hub: Elsewhere) -> None:
    piece = wire.FilePiece(offset=2**64 - 1, data=b"x")
    for request in (
        Read(operation=Read.CONTENT, path="job.toml", offset=2**64 - 1, count=1),
        Write(operation=Write.WRITE_AT, path=f"{LEASE}/mine", pieces=[piece]),
        Write(operation=Write.RESIZE, path=f"{LEASE}/mine", size_bytes=2**64 - 1),
    ):
        assert ask(hub.files, request).fault.errno == errno.EINVAL
    assert (hub.run.lease(1) / "mine").read_text() == "mine"


def test_an_older_generation_is_refused_in_the_middle_of_a_write(
    hub: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_disk, "CHUNK_BYTES", 10)
    disk, path = hub.disk(), hub.run.lease(1) / "file"
    disk.write(path, b"")
    written: list[bytes] = []

    def pieces() -> Iterator[Piece]:
        yield 0, b"0123456789" * 3
        written.append(path.read_bytes())
        hub.begin()
        yield 30, b"0123456789"

    with pytest.raises(RunFailed, match="generation 1 is over: the hub is at generation 8"):
        disk.write_at(path, pieces())
    assert written[0].startswith(b"0123456789") and not hub.run.lease(1).exists()
    assert list(hub.run.lease(8).iterdir()) == []


def test_between_two_leases_nothing_is_written(hub: Elsewhere) -> None:
    """The driver takes the old lease away before it tells the hub of the next generation."""
    hub.run.grant_lease()
    disk = hub.disk()
    with pytest.raises(FileNotFoundError):
        disk.write(hub.run.lease(1) / "file", b"x")
    with pytest.raises(FileNotFoundError):
        disk.make_folder(hub.run.lease(1) / "folder")
    for name in ("step-1", "step-1.removed-ab"):
        with pytest.raises(FileNotFoundError):
            disk.rename(hub.run.checkpoints / "step-1", hub.run.checkpoints / "step-1.replaced-ab")
        with pytest.raises(FileNotFoundError):
            disk.remove(hub.run.checkpoints / name)
    assert (hub.run.checkpoints / "step-1" / "model" / "file").exists() and not hub.run.lease(1).exists()


def test_a_file_that_is_written_anew_while_it_is_read_is_read_whole(
    hub: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_disk, "CHUNK_BYTES", 10)
    path = hub.run.plan
    path.write_bytes(b"a" * 25)
    asked = []
    content = hub_disk.HubDisk._ask

    def changed_once(disk: hub_disk.HubDisk, *args: Any, **fields: Any) -> wire.ReadReply:
        asked.append(fields)
        if len(asked) == 2:
            path.unlink()
            path.write_bytes(b"b" * 24)
        return content(disk, *args, **fields)

    monkeypatch.setattr(hub_disk.HubDisk, "_ask", changed_once)
    assert hub.disk().read(path, 100) == b"b" * 24


def test_a_job_without_a_run_folder_has_no_files() -> None:
    files = HubFiles(None, ())
    try:
        files.begin(1, [], [], Path("logs"))
        assert refusal(files, Read(path="job.toml")) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "this job has no run folder",
        )
    finally:
        files.close()
