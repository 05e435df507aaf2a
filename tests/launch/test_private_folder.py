"""Temporary folders of a process: for its user alone, and gone after it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from meshwright.launch.private_folder import private_folder

WAITS = """
import pathlib, sys
from meshwright.launch.private_folder import private_folder
with private_folder("meshwright-test-", pathlib.Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_this_users_alone_and_goes_with_its_process(tmp_path: Path) -> None:
    with private_folder("meshwright-test-", tmp_path) as folder:
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700 and folder.parent == tmp_path
        (folder / "file").write_text("content")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        living, killed = (Path((process.stdout or sys.stdin).readline().strip()) for process in processes)
        processes[1].kill()
        processes[1].wait()
        assert living.exists() and killed.exists()
        with private_folder("meshwright-test-", tmp_path) as folder:
            assert sorted(tmp_path.iterdir()) == sorted([living, folder])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_what_others_put_there_is_left_alone(tmp_path: Path) -> None:
    """Anybody may write into /tmp: a pipe in place of a lock is not waited for, a folder of another user stays."""
    for name in ("meshwright-test-a", "meshwright-test-b"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "meshwright-test-a" / "lock")
    (tmp_path / "meshwright-test-b" / "lock").touch()
    if os.geteuid() == 0:
        os.chown(tmp_path / "meshwright-test-b", 65534, 65534)
    with private_folder("meshwright-test-", tmp_path) as folder:
        assert folder.exists()
        assert (tmp_path / "meshwright-test-b").exists() == (os.geteuid() == 0)
