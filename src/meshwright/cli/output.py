"""Stdout for results, whose write errors are reported, and stderr for messages."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from meshwright.errors import Problem, RunFailed

#: What stands for a character that the terminal's encoding does not have; any other is shown as a backslash escape.
PLAIN = {ord(mark): plain for mark, plain in zip("█▓▒░·…–×", "#=+-..-x", strict=True)}


def _encodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    if error.object[error.start].translate(PLAIN).isascii():
        return error.object[error.start].translate(PLAIN), error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error("meshwright", _encodable)


class OutputFailed(RunFailed):
    """Stdout could not be written."""

    def __init__(self, reason: str) -> None:
        what = f"the output cannot be written: {reason}"
        super().__init__(Problem("stdout", what, "send it to a file on a disk with free space, or to /dev/null"))


class ReaderLeft(BrokenPipeError):
    """The reader of stdout has closed the pipe, as `| head` does."""


class _Output:
    """Stdout whose OSErrors become OutputFailed or ReaderLeft, so that they differ from those of files and sockets."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._failures():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._failures():
            self._stream.flush()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            raise ReaderLeft(*error.args) from error
        except OSError as error:
            raise OutputFailed(error.strerror or str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """Raises OutputFailed at once where stdout is closed, and at the end where it could not be written, even after a
    SystemExit (--help)."""
    if sys.stdout is None:
        raise OutputFailed(os.strerror(errno.EBADF))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's stand-in is none
            stream.reconfigure(errors="meshwright")
    output: Any = _Output(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            yield
        except SystemExit:
            output.flush()
            raise
        output.flush()


def drop_unwritten() -> None:
    """Discards output that cannot be written: Python would try again at exit, and print an error or end with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Prints a message on stderr. One that nobody can read, as after `2>&1 | head`, is dropped: work goes on."""
    if sys.stderr is not None:  # print(file=None) would print on stdout
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
