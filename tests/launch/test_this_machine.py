from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright import env, launch
from meshwright.cluster import cpu_cluster
from meshwright.errors import CannotWork, InputError, Problem, RunFailed


@pytest.fixture(autouse=True)
def _workers_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def eventually(true: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_results_come_back_by_rank_and_the_job_is_private(tmp_path: Path) -> None:
    processes = (os.cpu_count() or 1) + 1  # more ranks than cores
    started = launch.local("workers:describe", {"x": [1, "two"]}, processes, tmp_path / "logs")
    results = started.wait()
    assert [result["rank"] for result in results] == list(range(processes))
    for result in results:
        assert result["world"] == processes
        assert result["payload"] == {"x": [1, "two"]}
        assert result["threads"] == "1"
        assert result["interface"] == "lo"
        assert result["torch"] is False
    assert started.poll() == "done"
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(processes)}


def test_the_users_own_thread_count_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.local("workers:describe", {}, 1, tmp_path).wait()[0]["threads"] == "3"
    assert launch.local("workers:describe", {}, 1, tmp_path, env={"OMP_NUM_THREADS": "5"}).wait()[0]["threads"] == "5"


def test_processes_share_what_the_quota_of_a_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    groups = tmp_path / "groups"
    groups.mkdir()
    (groups / "own").write_text("0::/\n")
    (groups / "cpu.max").write_text("600000 100000\n")  # docker --cpus=6
    monkeypatch.setattr(env, "CGROUPS", groups)
    monkeypatch.setattr(env, "OWN_CGROUPS", groups / "own")
    results = launch.local("workers:describe", {}, 2, tmp_path / "logs").wait()
    assert [result["threads"] for result in results] == ["3", "3"]
    assert cpu_cluster(2).device.units == 3  # what a plan counts on


def test_the_store_joins_the_ranks(tmp_path: Path) -> None:
    assert launch.local("workers:all_reduce", {}, 2, tmp_path).wait() == [3.0, 3.0]


@pytest.mark.parametrize(("keep", "piece", "kept"), [(True, 1, True), (True, 64, False), (False, 1, False)])
def test_freed_memory_is_kept_or_returned_as_asked(keep: bool, piece: int, kept: bool, tmp_path: Path) -> None:
    """Pieces that are too large to be of use to others are returned in any case."""
    found = launch.local("workers:resident_after_freeing", {"piece": piece}, 1, tmp_path, keep_memory=keep).wait()
    assert (found[0] > 50 << 20) == kept


@pytest.mark.parametrize("rank", [0, 2])
def test_one_killed_rank_ends_all_and_is_named(tmp_path: Path, rank: int) -> None:
    started = launch.local("workers:kill_one", {"rank": rank}, 3, tmp_path)
    with pytest.raises(RunFailed, match=rf"rank {rank} of 3.*SIGKILL"):
        started.wait(60)
    assert not any(alive(pid) for pid in started.pids)
    assert started.poll() == "failed"


def test_an_exception_names_the_rank_the_words_and_the_log(tmp_path: Path) -> None:
    started = launch.local("workers:fail", {"zero": 0}, 2, tmp_path)
    with pytest.raises(RunFailed) as raised:
        started.wait(60)
    text = str(raised.value)
    assert "rank 1 of 2" in text and "ZeroDivisionError" in text and "about to divide" in text
    assert str(started.log(1)) in text
    assert not any(alive(pid) for pid in started.pids)


def test_a_start_that_fails_in_any_way_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="cannot start a process: embedded null byte"):
        launch.local("workers:describe", {}, 2, tmp_path, env={"NAME": "a\0b"})
    with pytest.raises(InputError, match=r"launch\.interface: there is no network interface 'l\\x00o'; known: "):
        launch.local("workers:describe", {}, 2, tmp_path, interface="l\0o")


def test_the_log_that_an_error_names_outlives_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RunFailed) as raised, launch.scratch_folder("try-") as folder:
        (folder / "gradients").mkdir()
        (folder / "gradients" / "large").write_bytes(b"0")
        launch.local("workers:fail", {"zero": 0}, 2, folder / "logs").wait(60)
    named = Path(raised.value.problems[0].nearest.removeprefix("whole log: "))
    assert "about to divide" in named.read_text() and not (folder / "gradients").exists()
    with launch.scratch_folder("try-") as folder:
        launch.local("workers:describe", {}, 1, folder).wait(60)
    assert not folder.exists()


@pytest.mark.parametrize("kind", [InputError, CannotWork])
def test_errors_of_our_tree_come_back_as_they_were(tmp_path: Path, kind: type[InputError]) -> None:
    with pytest.raises(kind) as raised:
        launch.local("workers:refuse", {"kind": kind.__name__}, 2, tmp_path).wait(60)
    assert raised.value.problems == (
        Problem("a.jsonl:3", "is no JSON", "write an object"),
        Problem("data.seq_len", "is 0"),
    )


def test_a_resume_command_survives_the_way_back(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as raised:
        launch.local("workers:fail_with_resume", {}, 1, tmp_path).wait(60)
    assert raised.value.resume == "meshwright train run/job.toml"


@pytest.mark.parametrize("status", [0, 7])
def test_an_exit_without_a_result_is_a_failure(tmp_path: Path, status: int) -> None:
    with pytest.raises(RunFailed, match=f"rank 0 of 1: ended with exit code {status} and left no result"):
        launch.local("workers:leave", {"status": status}, 1, tmp_path).wait(60)


def test_what_libraries_do_at_exit_takes_no_result_away(tmp_path: Path) -> None:
    with launch.local("workers:abort_at_exit", {}, 2, tmp_path) as workers:
        assert workers.wait(60) == [0, 1]


def test_a_function_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    for name in ("workers:nothing", "no_such_module:f", "workers", ":f"):
        with pytest.raises(InputError, match=r"package\.module:function"):
            launch.local(name, {}, 1, tmp_path).wait(60)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        launch.local("workers:describe", {}, 0, tmp_path)
    with pytest.raises(InputError, match="not JSON"):
        launch.local("workers:describe", {"x": object()}, 1, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        launch.local("workers:describe", {}, 1, tmp_path / "file")


def test_stop_asks_first(tmp_path: Path) -> None:
    started = launch.local("workers:polite", {"folder": str(tmp_path)}, 2, tmp_path)
    assert eventually(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    assert started.poll() == "running"
    with pytest.raises(TimeoutError):
        started.wait(0.01)
    started.stop()
    assert len(list(tmp_path.glob("tidied-*"))) == 2
    assert started.poll() == "stopped"
    with pytest.raises(RunFailed, match="stopped"):
        started.wait()


def test_what_returns_in_order_when_asked_to_end_has_its_result(tmp_path: Path) -> None:
    started = launch.local("workers:save_first", {"folder": str(tmp_path)}, 2, tmp_path)
    assert eventually(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    started.stop()
    assert started.poll() == "done"
    assert started.wait() == ["saved", "saved"]


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    with launch.local("workers:stubborn", {"folder": str(tmp_path)}, 2, tmp_path, grace_seconds=0.1) as started:
        assert eventually(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    assert not any(alive(pid) for pid in started.pids)


def test_workers_outlive_the_thread_that_started_them(tmp_path: Path) -> None:
    made: list[launch.Launch] = []
    arguments = ("workers:stubborn", {"folder": str(tmp_path)}, 1, tmp_path)
    thread = threading.Thread(target=lambda: made.append(launch.local(*arguments, grace_seconds=0.1)))
    thread.start()
    thread.join()
    assert eventually(lambda: len(list(tmp_path.glob("ready-*"))) == 1)
    time.sleep(0.1)
    assert made[0].poll() == "running"
    made[0].stop()


def test_a_killed_parent_takes_its_workers_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sockets = Path(tempfile.mkdtemp(dir="/tmp"))  # the path of a socket is short
    monkeypatch.setattr("tempfile.tempdir", str(sockets))
    script = (
        "import sys; from meshwright import launch; from pathlib import Path; folder = sys.argv[1]\n"
        "started = launch.local('workers:stubborn', {'folder': folder}, 2, folder)\n"
        "Path(folder, 'pids').write_text(' '.join(map(str, started.pids)))\n"
        "started.wait()\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, **paths, "TMPDIR": str(sockets)}
    )
    try:
        assert eventually(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
        assert eventually((tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(alive(pid) for pid in pids)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert eventually(lambda: not any(alive(pid) for pid in pids), seconds=20)
    # What the killed parent could not remove, the next start does.
    assert list(sockets.glob("meshwright-hub-*"))
    with launch.local("workers:describe", {}, 1, tmp_path) as later:
        assert len(list(sockets.glob("meshwright-hub-*"))) == 1
        later.wait(60)
    assert not list(sockets.glob("meshwright-hub-*"))
    sockets.rmdir()
