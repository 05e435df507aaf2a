"""The main program of a worker: `python -m meshwright.launch.worker`, configured by its environment.

It reads the function's name and payload from a file in memory that its parent has open, calls
`function(payload, context)`, and writes the result or the error as JSON into another. It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from meshwright import env
from meshwright.errors import InputError, MeshwrightError, Problem
from meshwright.launch.messages import error_to_dict
from meshwright.launch.rank import Context, place_of

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Function = Callable[[dict[str, Any], Context], Any]


def resolve(name: str) -> Function:
    """The function named "package.module:function". Raises InputError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        function: Function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            Problem("launch", f"cannot import {name!r}: {error}", "write package.module:function")
        ) from error
    if not callable(function):
        raise InputError(Problem("launch", f"{name!r} is not a function", "write package.module:function"))
    return function


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end at once if it is already dead."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os._exit(1)


def main() -> int:
    """Run the function. Returns the exit status: 0, or the code of the error that was written."""
    me = env.worker_files()
    if me is None:
        print("meshwright.launch.worker is started by `meshwright`, not by hand", file=sys.stderr)
        return 2
    end_with_parent(me.parent)
    spec = _read_spec(me.spec)
    context = Context(place_of(spec["place"]), lambda: str(_read_spec(me.spec)["place"]["dial"]["secret"]))
    status = 0
    answer: dict[str, Any]
    try:
        try:
            result = resolve(spec["function"])(spec["payload"], context)
        finally:
            context.close()
        answer = {"result": json.dumps(result, allow_nan=True)}
    except MeshwrightError as error:
        _print_traceback()
        status, answer = error.exit_code, {"error": error_to_dict(error)}
    except Exception as error:  # the parent raises RunFailed, the log has the traceback
        _print_traceback()
        status, answer = 1, {"failure": f"{type(error).__name__}: {error}"}
    answer["at"] = time.time()
    with os.fdopen(me.answer, "wb") as file:
        file.write(json.dumps(answer).encode())
    return status


def _read_spec(descriptor: int) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    return spec


def _print_traceback() -> None:
    with contextlib.suppress(OSError):  # a full disk takes no log, and the answer must still reach the parent
        traceback.print_exc()


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: a collective that still waits for a dead rank would keep the interpreter from ending, and a native
    # thread that outlives the interpreter would abort a process whose result is already there.
    os._exit(status)
