"""The command line: parses, runs the command, turns errors into messages and exit codes.

Nothing heavy is imported here, so that `meshwright --help` is quick.
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

from meshwright import env
from meshwright.cli.output import ReaderLeft, checked_output, drop_unwritten, say
from meshwright.cli.parser import build_parser
from meshwright.errors import InputError, MeshwrightError, Problem, RunFailed, nearest_name, refused_by_system

INTERRUPTED = 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The verb and its arguments. Raises InputError naming the nearest verb or flag for an unknown one."""
    parser, verbs = build_parser()
    first = arguments[0] if arguments else ""
    if first and not first.startswith("-") and first not in verbs:
        raise InputError(Problem("command line", f"unknown verb '{first}'", nearest_name(first, list(verbs))))
    options, extra = parser.parse_known_args(arguments)
    verb_parser = verbs[options.verb] if options.verb else parser
    flags = [flag for action in verb_parser._actions for flag in action.option_strings]
    problems = []
    for word in extra:
        words = getattr(options, "overrides", getattr(options, "words", None))
        if word.startswith("-"):
            flag = word.partition("=")[0]
            problems.append(Problem("command line", f"unknown flag '{flag}'", nearest_name(flag, flags)))
        elif words is not None:
            words.append(word)  # overrides may follow flags too
        else:
            problems.append(Problem("command line", f"unexpected argument '{word}'", f"see {verb_parser.prog} --help"))
    if problems:
        raise InputError(problems)
    if options.verb is None:
        parser.print_help()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (see `--help`). Raises only the SystemExit of --help."""
    try:
        with checked_output():
            options = parse(sys.argv[1:] if arguments is None else arguments)
            if options.verb is not None:
                from meshwright.cli import commands

                with _ended_in_order():
                    commands.run(options)
        return 0
    except MeshwrightError as error:
        if env.debug():
            traceback.print_exc()
        return _report(error)
    except KeyboardInterrupt:
        say("stopped")
        return INTERRUPTED
    except ReaderLeft:
        return 0
    except Exception as error:  # a refusal of the system, or a bug of ours
        if env.debug():
            traceback.print_exc()
        if (refused := _refused(error)) is not None:
            if isinstance(error.__context__, MeshwrightError):  # it could not be told fully, for the same reason
                _report(error.__context__)
            return _report(refused)
        say(f"error: {type(error).__name__}: {error}")
        say("this error was not expected; MESHWRIGHT_DEBUG=1 shows its traceback")
        return RunFailed.exit_code
    finally:
        drop_unwritten()


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end a verb as Ctrl-C does, so that `train` saves a checkpoint when a supervisor ends it
    or its terminal is closed. Once one of the three has come, others do not cut the end short. A signal that is ignored
    from the start stays so: nohup and shells rely on it."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    heeded = [kind for kind, handler in before.items() if handler != signal.SIG_IGN]

    def interrupt(_number: int, _frame: object) -> None:
        for kind in heeded:
            signal.signal(kind, _say_that_it_ends)  # not SIG_IGN, which a process that is being started would inherit
        raise KeyboardInterrupt

    for kind in heeded:
        signal.signal(kind, interrupt)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _say_that_it_ends(number: int, _frame: object) -> None:
    """Tells a person who presses Ctrl-C again what is waited for."""
    if number == signal.SIGINT:
        with contextlib.suppress(OSError):  # not by print, which may be what the signal has interrupted
            os.write(2, b"still stopping, for a minute at most; Ctrl-\\ ends at once, without saving\n")


def _refused(error: Exception) -> MeshwrightError | None:
    """A named problem, where the system or a text from outside is at fault rather than we."""
    if isinstance(error, UnicodeEncodeError):  # bytes of the command line or of a file's name that are not text
        return InputError(Problem("", f"{ascii(error.object)[:200]} is not UTF-8 text", "give it another name"))
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    elif isinstance(error, RuntimeError) and str(error) == "can't start new thread":  # Python has no class for it
        error = OSError(errno.EAGAIN, str(error))
    return refused_by_system(error) if isinstance(error, OSError) else None


def _report(error: MeshwrightError) -> int:
    for problem in error.problems:
        say(f"error: {problem}")
    if isinstance(error, RunFailed) and error.resume:
        say(f"resume with: {error.resume}")
    return error.exit_code
