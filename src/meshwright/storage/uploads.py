"""While a run is trained, its committed checkpoints are copied into a store by the process that started it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meshwright.errors import MeshwrightError, Problem, RunFailed
from meshwright.run import HELD_NAME, RunFolder
from meshwright.storage.run_copy import MANIFEST_NAME, LocalCheckpoint, RunCopy, newest_local

logger = logging.getLogger("meshwright")

#: How often the folder of checkpoints is looked at.
_LOOK_SECONDS = 0.5


@contextmanager
def kept_in_store(url: str | None, folder: RunFolder, keep: int, *, new: bool) -> Iterator[None]:
    """While inside, the run's data and each newest checkpoint are copied to `url` in the background; on leaving, the
    last one is. The newest `keep` stay there. `new`: the run has only begun, so the store may hold none. Without a
    `url` nothing is copied.

    An upload that fails is an event, and is tried again with the next checkpoint. Raises InputError at once where the
    store cannot be used, and RunFailed on leaving where the newest checkpoint is not in the store; it is in the folder.
    """
    for held in folder.checkpoints.glob(f"step-*/{HELD_NAME}"):  # of a process that died
        held.unlink(missing_ok=True)
    if url is None:
        yield
        return
    copy = RunCopy(url)
    copy.take(folder, new=new)
    uploads = _Uploads(copy, folder, keep)
    try:
        yield
    except BaseException:
        error = uploads.finish()
        if error is not None:  # what ended the run is the error to tell
            logger.warning("%s", error)
        raise
    error = uploads.finish()
    if error is not None:
        where = "the newest checkpoint is in the run folder and not in the store"
        raise RunFailed([*error.problems, Problem(str(folder.path), where, "resume to send it")]) from error


class _Uploads:
    """A thread that sends the newest checkpoint whenever there is one that the store lacks."""

    def __init__(self, copy: RunCopy, folder: RunFolder, keep: int) -> None:
        self._copy, self._folder, self._keep = copy, folder, keep
        self._data_sent = False
        self._seen: frozenset[tuple[str, int]] | None = None
        self._error: MeshwrightError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def finish(self) -> MeshwrightError | None:
        """Sends what is still to be sent; returns the error where that failed."""
        self._ended.set()
        self._thread.join()
        return self._error

    def _run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(_LOOK_SECONDS)
            there = self._manifests()
            if there != self._seen or (last and self._error is not None):
                self._seen = there
                self._attempt()

    def _manifests(self) -> frozenset[tuple[str, int]]:
        """Which checkpoints are committed, and when each was."""
        found = set()
        for path in self._folder.checkpoints.glob(f"step-*/{MANIFEST_NAME}"):
            try:
                found.add((path.parent.name, path.stat().st_mtime_ns))
            except FileNotFoundError:  # the run deletes old ones
                continue
        return frozenset(found)

    def _attempt(self) -> None:
        """Sends data and newest checkpoint, as far as the store lacks them. An error is an event, and is kept."""
        newest: LocalCheckpoint | None = None
        if self._ended.is_set() and not self._manifests():
            return  # the run ended before its first checkpoint: data alone are of no use
        try:
            if not self._data_sent:
                self._copy.send_data(self._folder.manifest)
                self._data_sent = True
            with _held(lambda: newest_local(self._folder.checkpoints)) as newest:
                if newest is not None:
                    self._send(newest)
            self._error = None
        except Exception as error:
            words = (
                error
                if isinstance(error, MeshwrightError)
                else RunFailed(Problem(self._copy.store.url, f"{type(error).__name__}: {error}"))
            )
            self._error = words
            step = {} if newest is None else {"step": newest.step}
            logger.warning("not uploaded: %s", words.problems[0])
            try:
                self._folder.append_event("upload", **step, error=str(words.problems[0]))
            except OSError as second:  # a full disk: the error is told at the end
                logger.warning("%s", second)

    def _send(self, newest: LocalCheckpoint) -> None:
        if self._copy.has(newest):
            return
        begin = time.monotonic()
        sent = self._copy.send_checkpoint(newest, self._keep)
        seconds = round(time.monotonic() - begin, 3)
        self._folder.append_event(
            "upload", step=newest.step, url=self._copy.store.place(sent.name), bytes=sent.bytes, seconds=seconds
        )


@contextmanager
def _held(newest: Callable[[], LocalCheckpoint | None]) -> Iterator[LocalCheckpoint | None]:
    """The newest checkpoint, marked so that the run does not delete it meanwhile."""
    while True:
        found = newest()
        if found is None:
            yield None
            return
        mark = found.folder / HELD_NAME
        try:
            mark.touch()
        except FileNotFoundError:  # deleted since: there is a newer one
            continue
        break
    try:
        yield found
    finally:
        mark.unlink(missing_ok=True)
