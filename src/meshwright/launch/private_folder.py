"""Temporary folders that only this user can read, and that do not outlive the processes that made them for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def private_folder(prefix: str, root: Path) -> Iterator[Path]:
    """A new folder of mode 0700 in `root`. Removes those of the same prefix that killed processes left there."""
    _sweep(prefix, root)
    folder = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=root))  # a name that no other process removes
    try:
        with open(folder / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = folder.rename(folder.with_name(folder.name[1:]))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(prefix: str, root: Path) -> None:
    """Removes folders whose process is dead: no process holds their lock."""
    for folder in root.glob(prefix + "*"):
        try:
            if folder.lstat().st_uid != os.geteuid():
                continue  # whatever lies there
            # Neither a pipe, which would be waited for, nor a link.
            lock = os.open(folder / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # its process lives
        finally:
            os.close(lock)
