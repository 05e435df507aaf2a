"""From chat messages to a prompt, by the model's own template or a plain default."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from meshwright.data.tokenizer import present_files, special_tokens
from meshwright.errors import InputError, Problem
from meshwright.files import decode_text, read_capped, read_object
from meshwright.serve.errors import RequestError, bad_request

#: For a model without a template: each message as "role: content", then the role that the model continues.
DEFAULT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"

MAX_TEMPLATE_BYTES = 256 << 10
MAX_CONFIG_BYTES = 16 << 20
RENDER_CPU_SECONDS = 2.0
RENDER_WALL_SECONDS = 20.0

_PROGRAM = Path(__file__).with_name("template.py")


@dataclass(frozen=True)
class ChatTemplate:
    """`source` is jinja2; `special` are the special tokens that it may use (bos_token, ...); `own`: the model's own.

    A model's own template writes the special tokens itself; for the default one the tokenizer adds them.
    """

    source: str
    special: dict[str, str]
    own: bool


def _read_text(path: Path) -> str:
    try:
        return decode_text(read_capped(path, MAX_TEMPLATE_BYTES, follow_links=True))
    except ValueError as error:
        raise InputError(Problem(str(path), "not UTF-8 text")) from error


def read_chat_template(folder: Path) -> ChatTemplate:
    """The template of a model folder: chat_template.jinja, else tokenizer_config.json's, else the default.

    Raises InputError for a file that exists and cannot be read.
    """
    path = folder / "tokenizer_config.json"
    config = read_object(path, MAX_CONFIG_BYTES) if path.is_file() else {}
    special = special_tokens(present_files(folder), str(folder / "tokenizer.json"))
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        return ChatTemplate(_read_text(template_file), special, own=True)
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        if "default" not in named:
            names = ", ".join(str(name)[:60] for name in named)
            where = f"{folder / 'tokenizer_config.json'}: chat_template"
            raise InputError(
                Problem(where, f"has no template named default, but {names or 'none'}", "name one default")
            )
        source = named["default"]
    if source is None:
        return ChatTemplate(DEFAULT_TEMPLATE, special, own=False)
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
        where = f"{folder / 'tokenizer_config.json'}: chat_template"
        raise InputError(Problem(where, f"not a text of at most {MAX_TEMPLATE_BYTES} bytes"))
    return ChatTemplate(source, special, own=True)


class Renderer:
    """Renders one template in a process of its own. Any number of tasks may call `render`; they take turns."""

    def __init__(self, template: ChatTemplate, *, cpu_seconds: float = RENDER_CPU_SECONDS) -> None:
        """cpu_seconds: limit of processor time for compiling the template, and for each render."""
        self.template = template
        self._cpu_seconds = cpu_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Renderer:
        """Starts the process, so that a template that does not compile is an InputError now, not a 400 later."""
        async with self._lock:
            fault = await self._start()
        if fault is not None:
            await self.close()
            raise InputError(Problem("chat template", fault))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _start(self) -> str | None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(_PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            cwd="/",
        )
        answer = await self._ask({"template": self.template.source, "cpu_seconds": self._cpu_seconds})
        if answer is None:
            return "it takes too long to compile"
        return answer.get("error")

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The process's answer, or None where it ended or was killed before it answered."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        body = json.dumps(message).encode()
        try:
            async with asyncio.timeout(RENDER_WALL_SECONDS):
                process.stdin.write(struct.pack(">I", len(body)) + body)
                await process.stdin.drain()
                (length,) = struct.unpack(">I", await process.stdout.readexactly(4))
                answer: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
                return answer
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            await self.close()
            return None
        except BaseException:  # cancelled before the answer: the next call must not read this answer
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the process. May be called twice."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt for `messages`. Raises RequestError (400) if the template refuses them or exceeds its limits."""
        asked = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        values = {**asked, **self.template.special}
        async with self._lock:
            running = self._process is not None and self._process.returncode is None
            if not running and (fault := await self._start()) is not None:
                raise RequestError(500, f"the model's chat template does not compile: {fault}", code="chat_template")
            answer = await self._ask(values)
        if answer is None:
            raise bad_request("the model's chat template takes too long or too much memory", code="chat_template")
        if "error" in answer:
            raise bad_request(
                f"the model's chat template refuses these messages: {answer['error']}",
                param="messages",
                code="chat_template",
            )
        text: str = answer["text"]
        return text
