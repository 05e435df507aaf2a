"""The keys of a hub, and torch's process groups over them, against torch's own stores."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import launch
from meshwright.errors import RunFailed
from meshwright.launch import Context
from meshwright.launch.hub import Hub
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.keys import MAX_KEY_BYTES, KeyTable
from meshwright.launch.messages import RankPlace
from meshwright.launch.wire import hub_pb2 as wire
from meshwright.process_group import HubStore

SHORT_SECONDS = 0.05
serials = itertools.count()


@pytest.fixture(scope="module")
def files() -> Iterator[HubFiles]:
    found = HubFiles(None, [])
    found.hub.begin(1, [], [], "")
    yield found
    found.close()


def context_of(files: HubFiles, generation: int | None = None) -> Context:
    number = files.hub.generation if generation is None else generation
    return Context(RankPlace("rank", 0, 2, 0, 0, number, Path(), files.local))


def new_store(files: HubFiles, timeout_seconds: float = 5.0) -> HubStore:
    return HubStore(context_of(files).keys(f"{next(serials)}/"), timeout_seconds)


KEYS = st.sampled_from(["a", "b", "c", "ä/1"])
VALUES = st.binary(max_size=4)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, VALUES),
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("add"), st.sampled_from(["n", "m"]), st.integers(-(2**40), 2**40)),
        st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES),
        st.tuples(st.just("check"), st.lists(KEYS | st.just("n"), max_size=3)),
        st.tuples(st.just("wait"), st.lists(KEYS, max_size=3)),
        st.tuples(st.just("delete_key"), KEYS | st.just("n")),
        st.tuples(st.just("num_keys")),
    ),
    max_size=25,
)


def done(store: Any, operation: tuple[Any, ...], before: int = 0) -> Any:
    """What an operation returns, or that it found no key in time."""
    name, *arguments = operation
    try:
        if name == "wait":
            return store.wait(*arguments, timedelta(seconds=0.002))
        found = getattr(store, name)(*arguments)
        return found - before if name == "num_keys" else found
    except (dist.DistError, TimeoutError):  # torch's and ours
        return "timeout"


@settings(max_examples=60)
@given(OPERATIONS)
def test_every_operation_answers_as_torchs_own_store_in_memory(files: HubFiles, operations: list[Any]) -> None:
    ours, torchs = new_store(files, 0.002), dist.HashStore()
    torchs.set_timeout(timedelta(seconds=0.002))
    before = ours.num_keys()  # of any prefix
    for operation in operations:
        assert done(ours, operation, before) == done(torchs, operation), operation


def test_and_as_torchs_own_store_in_a_file(files: HubFiles, tmp_path: Path) -> None:
    ours, torchs = new_store(files), dist.FileStore(str(tmp_path / "file"), 1)
    for operation in (
        ("set", "a", b"1"),
        ("get", "a"),
        ("add", "n", 5),
        ("add", "n", -7),
        ("get", "n"),
        ("set", "a", b"\0"),
        ("get", "a"),
        ("check", ["a", "n"]),
        ("check", ["b"]),
        ("delete_key", "a"),
        ("check", ["a"]),
    ):
        assert done(ours, operation) == done(torchs, operation), operation


def test_a_wait_ends_when_another_sets_the_last_key(files: HubFiles) -> None:
    store = new_store(files)
    store.set("a", b"1")
    later = threading.Timer(SHORT_SECONDS, lambda: store.set("b", b"2"))
    later.start()
    store.wait(["a", "b"])
    assert store.get("b") == b"2"
    later.join()


def test_a_wait_longer_than_one_request_goes_on(files: HubFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.launch.keys.LONGEST_WAIT_SECONDS", SHORT_SECONDS)
    store = new_store(files)
    later = threading.Timer(6 * SHORT_SECONDS, lambda: store.set("late", b"1"))
    later.start()
    assert store.get("late") == b"1"
    later.join()


def test_who_waits_in_vain_is_told_which_keys_lack(files: HubFiles) -> None:
    store = new_store(files)
    store.set_timeout(timedelta(seconds=SHORT_SECONDS))
    assert store.timeout == timedelta(seconds=SHORT_SECONDS)
    with pytest.raises(TimeoutError, match=r"no rank has set missing within 0\.05 s"):
        store.get("missing")
    with pytest.raises(TimeoutError, match=r"no rank has set x, y within 0\.01 s"):
        store.wait(["x", "y"], timedelta(seconds=0.01))


def test_prefixes_are_apart(files: HubFiles) -> None:
    one, two = new_store(files), new_store(files)
    one.set("key", b"1")
    assert not two.check(["key"])


def test_what_cannot_be_done_is_refused_in_words(files: HubFiles, caplog: pytest.LogCaptureFixture) -> None:
    store = new_store(files)
    store.set("text", b"no number")
    with pytest.raises(RunFailed, match=r"refuses this rank: .*invalid literal for int"):
        store.add("text", 1)
    with pytest.raises(RunFailed, match=f"keys may have {MAX_KEY_BYTES} bytes"):
        store.set("k" * (MAX_KEY_BYTES + 1), b"")
    with pytest.raises(RunFailed, match=r"refuses this rank"):  # larger than a message
        store.set("large", bytes(65 << 20))
    store.set("n", str(2**63 - 1).encode())
    with pytest.raises(RunFailed, match="refuses this rank"):
        store.add("n", 1)
    assert int(store.get("n")) == 2**63 - 1
    assert store.get("text") == b"no number"
    assert not caplog.records  # nothing of it is written to the driver's stderr


def test_the_table_holds_so_much_and_no_more_and_a_key_that_is_replaced_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meshwright.launch.keys.MAX_TABLE_BYTES", 1000)
    table, ids = KeyTable(), itertools.count(1)
    table.clear(1)

    def write(key: str, operation: Any = wire.KeyRequest.SET) -> None:
        table.answer(wire.KeyRequest(operation=operation, keys=[key], value=bytes(500), id=next(ids)), 1)

    for _ in range(5):
        write("one")
    with pytest.raises(ValueError, match="1000"):
        write("two")
    write("one", wire.KeyRequest.DELETE)
    write("two")


def test_a_request_that_comes_twice_acts_once() -> None:
    """As where its answer was lost with the connection."""
    table = KeyTable()
    table.clear(1)
    add = wire.KeyRequest(operation=wire.KeyRequest.ADD, keys=["n"], amount=1, id=11)
    drop = wire.KeyRequest(operation=wire.KeyRequest.DELETE, keys=["n"], id=12)
    assert [table.answer(add, 1).number for _ in range(2)] == [1, 1]  # type: ignore[union-attr]
    assert [table.answer(drop, 1).found for _ in range(2)] == [True, True]  # type: ignore[union-attr]
    table.clear(2)
    assert table.answer(add, 2).number == 1  # type: ignore[union-attr]


def test_an_older_generation_gets_nothing_and_its_waits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    files = HubFiles(None, [])
    try:
        hub: Hub = files.hub
        hub.begin(1, [], [], "")
        old = context_of(files).keys()
        old.set("key", b"old")
        ended: list[BaseException] = []

        def wait() -> None:
            try:
                old.get("never", 60.0)
            except BaseException as error:
                ended.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(SHORT_SECONDS)
        hub.begin(2, [], [], "")
        waiting.join(10)
        assert "generation 1 is over: the hub is at generation 2" in str(ended[0])
        for use in (lambda: old.set("key", b"x"), lambda: old.get("key", 1), lambda: old.add("n", 1), old.count):
            with pytest.raises(RunFailed, match="generation 1 is over"):
                use()
        assert not context_of(files).keys().check(["key"])
    finally:
        files.close()


def test_meshes_and_groups_are_made_over_the_keys(tmp_path: Path) -> None:
    world = 4
    found = launch.local("tests.launch.workers:meshes", {}, world, tmp_path).wait(120)
    total = world * (world + 1) / 2
    for rank, answer in enumerate(found):
        assert answer["all"] == total
        assert answer["again"] == 2 * total  # a second process group of another name
        pair = rank // 2 * 2
        assert answer["row"] == (pair + 1) + (pair + 2)  # of a mesh of 2 columns
        assert answer["even"] == (sum(range(1, world + 1, 2)) if rank % 2 == 0 else None)


def test_a_rank_that_lacks_is_told_in_time(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as raised:
        launch.local("tests.launch.workers:meet_without_the_last", {"timeout_seconds": 2}, 2, tmp_path).wait(120)
    assert "rank 0 of 2" in str(raised.value)
    assert "within 2 s" in str(raised.value) or "timed out" in str(raised.value).lower()
