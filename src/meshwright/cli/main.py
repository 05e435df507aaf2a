"""The command line: parses, lets commands.py do it, turns errors into messages and exit codes.

Nothing heavy is imported here: `meshwright --help` answers before torch could be loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from meshwright import env
from meshwright.cli.parser import build_parser
from meshwright.errors import InputError, MeshwrightError, Problem, RunFailed, nearest_name

INTERRUPTED = 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its arguments. Raises InputError naming the nearest verb or flag for an unknown one."""
    parser, verbs = build_parser()
    first = arguments[0] if arguments else ""
    if first and not first.startswith("-") and first not in verbs:
        raise InputError(Problem("command line", f"unknown verb '{first}'", nearest_name(first, list(verbs))))
    options, extra = parser.parse_known_args(arguments)
    known = verbs[options.verb] if options.verb else parser
    flags = [flag for action in known._actions for flag in action.option_strings]
    problems = []
    for word in extra:
        words = getattr(options, "overrides", getattr(options, "words", None))
        if word.startswith("-"):
            flag = word.partition("=")[0]
            problems.append(Problem("command line", f"unknown flag '{flag}'", nearest_name(flag, flags)))
        elif words is not None:
            words.append(word)  # overrides may come after flags too
        else:
            problems.append(Problem("command line", f"'{word}' is one word too many", f"see {known.prog} --help"))
    if problems:
        raise InputError(problems)
    if options.verb is None:
        parser.print_help()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `--help`). Raises nothing but SystemExit of --help."""
    try:
        with _checked_output():
            options = parse(sys.argv[1:] if arguments is None else arguments)
            if options.verb is not None:
                from meshwright.cli import commands

                with _terminated_as_interrupted():
                    commands.run(options)
        return 0
    except MeshwrightError as error:
        if env.debug():
            traceback.print_exc()
        return _report(error)
    except KeyboardInterrupt:
        _say("stopped")
        return INTERRUPTED
    except BrokenPipeError:  # the reader left, as of `| head`
        return 0
    except Exception as error:  # a bug of ours, or a broken machine: reported in one line, with the way to see more
        if env.debug():
            traceback.print_exc()
        _say(f"error: {type(error).__name__}: {error}")
        _say("this is not a message we foresaw; MESHWRIGHT_DEBUG=1 shows where it came from")
        return RunFailed.exit_code
    finally:
        _drop_unwritten()


class OutputFailed(RunFailed):
    """Stdout, which is the result, could not be written."""

    def __init__(self, reason: str) -> None:
        what = f"the output cannot be written: {reason}"
        super().__init__(Problem("stdout", what, "send it to a file with room, or to /dev/null"))


class _Output:
    """Stdout, whose failures are told from those of any other file; a reader that left stays a BrokenPipeError."""

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
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputFailed(error.strerror or str(error)) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _checked_output() -> Iterator[None]:
    """Raises OutputFailed where stdout is closed, before anything is done, and where what is printed inside cannot be
    written, a help text that ends in SystemExit too."""
    if sys.stdout is None:
        raise OutputFailed(os.strerror(errno.EBADF))
    output: Any = _Output(sys.stdout)
    with contextlib.redirect_stdout(output):
        try:
            yield
        except SystemExit:
            output.flush()
            raise
        output.flush()


def _drop_unwritten() -> None:
    """Lets what stdout does not take go nowhere: Python would try again at exit, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM end a verb as Ctrl-C does, so that `train` saves first when a supervisor ends it."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(error: MeshwrightError) -> int:
    for problem in error.problems:
        _say(f"error: {problem}")
    if isinstance(error, RunFailed) and error.resume:
        _say(f"resume with: {error.resume}")
    return error.exit_code


def _say(text: str) -> None:
    if sys.stderr is not None:  # print would take stdout for it
        print(text, file=sys.stderr, flush=True)
