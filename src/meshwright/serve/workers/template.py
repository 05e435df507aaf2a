"""The program that renders a model's chat template, in a process of its own.

A template is code that comes with a model's files: it may loop for ever or use all memory. So it runs in jinja2's
immutable sandbox, in a process with limits on memory and processor time that inherits neither files nor environment. A
render that exceeds them ends this process, and the server starts another. `chat.py` starts this file by its path, so it
imports nothing of Meshwright. It reads and writes JSON behind a four-byte length.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import struct
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY_BYTES = 512 << 20
MAX_RENDERED_CHARACTERS = 4 << 20


class TemplateException(jinja2.TemplateError):
    """Raised by a template that calls raise_exception(message)."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; in serving its body is plain content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own: what is set inside does not reach out of it.
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise TemplateException(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox, with the names that Hugging Face's templates expect."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def render(template: jinja2.Template, values: dict[str, Any]) -> dict[str, str]:
    """`{text}` or `{error}`: the template's own message, or the kind of error without details."""
    try:
        parts: list[str] = []
        size = 0
        for part in template.generate(**values):
            size += len(part)
            if size > MAX_RENDERED_CHARACTERS:
                return {"error": "its text is too long"}
            parts.append(part)
        return {"text": "".join(parts)}
    except TemplateException as error:
        return {"error": str(error)[:500]}
    except jinja2.sandbox.SecurityError:
        return {"error": "it does something that the sandbox forbids"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template can raise anything; details may contain addresses
        return {"error": f"it failed with {type(error).__name__}"}


def _read() -> dict[str, Any] | None:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    message: dict[str, Any] = json.loads(sys.stdin.buffer.read(length))
    return message


def _write(message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()


def main() -> None:
    """First message: {template, cpu_seconds}, answered by {} or {error}; then an answer for each set of values."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    first = _read()
    if first is None:
        return
    cpu_seconds = float(first["cpu_seconds"])
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        template = environment().from_string(first["template"])
    except jinja2.TemplateSyntaxError as error:
        return _write({"error": f"line {error.lineno}: {error.message}"[:500]})
    except Exception as error:  # compiling hostile text can raise anything
        return _write({"error": f"it failed with {type(error).__name__}"})
    _write({})
    while (values := _read()) is not None:
        # Without a handler on purpose: the signal's default ends the process even inside a long C call.
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
        answer = render(template, values)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _write(answer)


if __name__ == "__main__":
    main()
