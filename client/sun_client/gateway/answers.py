"""Answers of `/v1/chat/completions` in OpenAI's form: one object, or chunks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from sun_client.gateway.chat import ChatRequest
from sun_client.wire import Piece


@dataclass
class Answer:
    """An answer in the making, of `ChatRequest.n` choices. id: the request's, as in the server's request log."""

    request: ChatRequest
    id: str
    fingerprint: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self._begun: set[int] = set()
        self._whole = [Piece() for _ in range(self.request.n)]

    def add(self, index: int, piece: Piece) -> None:
        """Take a piece of a choice for `whole`."""
        whole = self._whole[index]
        whole.text += piece.text
        whole.logprobs += piece.logprobs
        whole.finish_reason = piece.finish_reason
        self._count(piece)

    def whole(self) -> dict[str, Any]:
        """The object `chat.completion`."""
        choices = [{
            "index": index, "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece), "finish_reason": piece.finish_reason,
        } for index, piece in enumerate(self._whole)]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The objects `chat.completion.chunk` of a choice's piece, perhaps none: the role comes first, the finish reason last and alone."""
        self._count(piece)
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk(index, {"role": "assistant", "content": ""}))
        if piece.text or piece.logprobs:
            chunks.append(self._chunk(index, {"content": piece.text}, self._logprobs(piece)))
        if piece.finish_reason:
            chunks.append(self._chunk(index, {}, finish_reason=piece.finish_reason))
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """What follows all choices' chunks: the usage, if it was asked for."""
        return [{**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}] if self.request.include_usage else []

    def _count(self, piece: Piece) -> None:
        self.prompt_tokens = piece.num_input_tokens
        self.completion_tokens += len(piece.token_ids)

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.task, "system_fingerprint": self.fingerprint}

    def _usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        asked = self.request.sampling["logprobs"]
        return {"content": [{**_entry(entry), "top_logprobs": [_entry(other) for other in entry["top"][:asked]]} for entry in piece.logprobs],
                "refusal": None}


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    """A token and its logprob. Its bytes are null where it is but a part of a character."""
    token = entry["token"]
    return {"token": token, "logprob": entry["logprob"], "bytes": None if "\ufffd" in token else list(token.encode())}
