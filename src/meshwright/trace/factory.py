"""`module = "package.file:build"`: finds the user's build function and checks it before it is called."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from meshwright.errors import InputError, Problem, nearest_name

KEY = "model.module"


def load_factory(
    reference: str, arguments: Mapping[str, Any] | None = None, folders: Sequence[Path | str] = ()
) -> Callable[[], nn.Module]:
    """The build function that `reference` ("package.file:function") names, with `arguments` bound to it.

    `folders` (the job's `model.module_folder`) and then the current folder are added to the import path, for good, as
    with `python -m`. Each call of the result builds one module.
    Raises InputError if the file or function is missing, is not callable, or does not take the arguments; the result
    raises it if the function fails or does not return an `nn.Module`. The user's code prints to stderr: stdout is the
    result of the command.
    """
    module_name, _, attribute = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise InputError(Problem(KEY, f"'{reference}' does not name a function", 'write "package.file:build"'))
    module = _import(module_name, [*(Path(folder).resolve() for folder in folders), Path.cwd()])
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            known = [name for name, value in vars(function).items() if callable(value) and not name.startswith("_")]
            raise InputError(
                Problem(KEY, f"{module.__file__} has no '{part}'", nearest_name(part, known) if known else "")
            )
        function = getattr(function, part)
    if not callable(function):
        what = f"'{reference}' is a {type(function).__name__}, not a function"
        raise InputError(Problem(KEY, what, "name a function that returns the nn.Module"))
    bound = dict(arguments or {})
    _check_arguments(reference, function, bound)
    return functools.partial(_build, reference, function, bound)


def source_digest(factory: Callable[[], nn.Module]) -> str:
    """SHA-256 of the file that defines the build function of `load_factory`, "" where it has none."""
    function = factory.args[1] if isinstance(factory, functools.partial) else factory
    try:
        file = inspect.getsourcefile(function)
    except TypeError:  # written in C, or an object that can be called
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def _build(reference: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    with user_code(f"'{reference}'"):
        module = function(**arguments)
    if not isinstance(module, nn.Module):
        what = f"'{reference}' returned a {type(module).__name__}, not an nn.Module"
        raise InputError(Problem(KEY, what, "let it return the module itself"))
    return module


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """For running the user's code: its output goes to stderr, and any exception, `sys.exit` too, becomes an InputError
    that `what` failed, with the line that raised it."""
    try:
        with print_to_stderr():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise InputError(Problem(KEY, f"{what} failed: {describe(error)}")) from error


def print_to_stderr() -> contextlib.redirect_stdout[ToStderr]:
    """Redirects stdout to stderr."""
    return contextlib.redirect_stdout(ToStderr())


class ToStderr(io.TextIOBase):
    """Writes to stderr and never closes it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)


def _import(name: str, folders: Sequence[Path]) -> ModuleType:
    for folder in reversed(folders):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    top = name.partition(".")[0]
    spec = PathFinder.find_spec(top, [str(folder) for folder in folders])
    if spec is not None and top in sys.modules and not _is_from(sys.modules[top], spec):
        where = getattr(sys.modules[top], "__file__", None) or "Python itself"
        what = f"{spec.origin or top} has the name of a module that is already loaded ({where})"
        raise InputError(Problem(KEY, what, "give your file another name"))
    try:
        with print_to_stderr():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise InputError(Problem(KEY, f"importing '{name}' failed: {describe(error)}", "install it")) from error
        raise InputError(Problem(KEY, f"there is no module '{name}'", _nearest_file(name, folders))) from error
    except (Exception, SystemExit) as error:  # the user's file may raise anything when it is imported
        raise InputError(Problem(KEY, f"importing '{name}' failed: {describe(error)}")) from error


def _is_from(module: ModuleType, spec: ModuleSpec) -> bool:
    """Whether `spec` would load `module`, which is loaded already. Folders without __init__.py have no file."""
    if module.__spec__ is not None and module.__spec__.origin is None and spec.origin is None:
        here = {str(Path(path).resolve()) for path in spec.submodule_search_locations or ()}
        return bool(here & {str(Path(path).resolve()) for path in module.__spec__.submodule_search_locations or ()})
    loaded = getattr(module, "__file__", None)
    return bool(loaded and spec.origin and Path(loaded).resolve() == Path(spec.origin).resolve())


def _nearest_file(name: str, folders: Sequence[Path]) -> str:
    """Names the closest Python file under the folders that were searched."""
    if name.endswith(".py"):
        return f"did you mean '{name.removesuffix('.py')}'? Without .py"
    *parents, last = name.split(".")
    known: dict[str, None] = {}
    for folder in folders:
        for path in sorted(folder.joinpath(*parents).glob("*.py")):
            if path.stem != "__init__":
                known[".".join([*parents, path.stem])] = None
        for path in sorted(folder.glob(f"*/{last}.py")):
            known[f"{path.parent.name}.{last}"] = None
    looked = "looked in " + ", ".join(str(folder) for folder in dict.fromkeys(folders))
    exact = [candidate for candidate in known if candidate.rpartition(".")[2] == last]
    if exact:
        return f"did you mean '{exact[0]}'? {looked}"
    return f"{nearest_name(name, list(known)[:20])}; {looked}" if known else looked


def _check_arguments(reference: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # written in C: wrong arguments show when it is called
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    problems = [
        Problem(
            f"model.arguments.{name}",
            f"'{reference}' takes no '{name}'",
            nearest_name(name, named) if named else "it takes no arguments",
        )
        for name in arguments
        if name not in named and not takes_any
    ]
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
            what = f"'{reference}' takes '{p.name}' by position only"
            problems.append(Problem(KEY, what, "let every argument be given by name"))
        elif p.name in named and p.default is p.empty and p.name not in arguments:
            what = f"'{reference}' needs '{p.name}', which has no default"
            problems.append(Problem("model.arguments", what, f"add {p.name} = ..."))
    if problems:
        raise InputError(problems)


def describe(error: BaseException) -> str:
    """One line for an exception of the user's code: kind, message, and the last line of a file that is not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    torch_folder = str(Path(nn.__file__).parent.parent)
    outside = [frame for frame in frames if not frame.filename.startswith((ours, torch_folder, "<frozen"))]
    message = str(error).strip().split("\n")[0]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}:{error.lineno})"
    return f"{text} ({outside[-1].filename}:{outside[-1].lineno})" if outside else text
