"""Answers in OpenAI's format, whole and as a stream of events, for completions and for chat."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from meshwright.serve.workers.served_model import Reply, ServedModel, TextChunk

DONE = b"data: [DONE]\n\n"
#: The ends of lines in Unicode that JSON allows unescaped.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


@dataclass(frozen=True)
class Endpoint:
    """The format of the answers of an endpoint."""

    whole_object: str
    chunk_object: str
    is_chat: bool


COMPLETION = Endpoint("text_completion", "text_completion", is_chat=False)
CHAT = Endpoint("chat.completion", "chat.completion.chunk", is_chat=True)


@dataclass(frozen=True)
class Answer:
    """An answer: its format, its id, the model that it names, and the number of choices for each prompt."""

    endpoint: Endpoint
    id: str
    model: ServedModel
    choices_per_prompt: int = 1

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model.name}

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer. Raises RequestError."""
        await reply.accepted()
        count = len(reply.prompt_tokens)
        texts: list[list[str]] = [[] for _ in range(count)]
        reasons = [""] * count
        tokens = 0
        async for choice, piece in reply:
            texts[choice].append(piece.text)
            tokens += piece.tokens
            reasons[choice] = piece.finish_reason or reasons[choice]
        choices = [self._whole_choice(i, "".join(texts[i]), reasons[i]) for i in range(count)]
        return {**self._head(self.endpoint.whole_object), "choices": choices, "usage": self._usage(reply, tokens)}

    def _usage(self, reply: Reply, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = sum(reply.prompt_tokens[:: self.choices_per_prompt])  # a prompt counts once
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _whole_choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        if self.endpoint.is_chat:
            content = {"message": {"role": "assistant", "content": text}}
        else:
            content = {"text": text}  # type: ignore[dict-item]
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    async def events(self, reply: Reply, *, include_usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream: for chat first the role; then the text and finish reason of each choice, the usage
        with `include_usage`, and [DONE]. Raises RequestError if the engine is lost.
        """
        head = self._head(self.endpoint.chunk_object)
        tail = {"usage": None} if include_usage else {}
        tokens = 0
        if self.endpoint.is_chat:
            for index in range(len(reply.prompt_tokens)):
                yield event_bytes(
                    head | {"choices": [_chat_choice(index, {"role": "assistant", "content": ""})]} | tail
                )
        async for index, piece in reply:
            tokens += piece.tokens
            for choice in self._chunk_choices(index, piece):
                yield event_bytes(head | {"choices": [choice]} | tail)
        if include_usage:
            yield event_bytes(head | {"choices": [], "usage": self._usage(reply, tokens)})
        yield DONE

    def _chunk_choices(self, index: int, piece: TextChunk) -> list[dict[str, Any]]:
        """The choices for a piece of text: none if it has neither text nor a finish reason."""
        reason = piece.finish_reason
        if not self.endpoint.is_chat:
            choice = {"index": index, "text": piece.text, "logprobs": None, "finish_reason": reason}
            return [choice] if piece.text or reason else []
        choices = [_chat_choice(index, {"content": piece.text})] if piece.text else []
        return [*choices, _chat_choice(index, {}, reason)] if reason else choices


def _chat_choice(index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def event_bytes(value: dict[str, Any]) -> bytes:
    """One server-sent event, on one line also for clients to which these three characters end a line."""
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)
    return b"data: " + line.encode() + b"\n\n"
