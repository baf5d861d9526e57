"""Training and test data: chat JSONL, prompt and completion, or a dataset on the hub; refused by file, line and reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sun.text.prompt import PromptFormat, check_message, check_messages


@dataclass(frozen=True)
class Conversation:
    """Messages [{"role", "content"}] with at least one assistant turn, where they were read, and what else the row has."""

    where: str
    messages: list[dict[str, Any]]
    row: dict[str, Any]

    @property
    def last_turn(self) -> int:
        """Index of the last assistant turn."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")


@dataclass(frozen=True)
class Example:
    """One assistant turn: the prompt's token ids x1..xn and the response's y1..ym, the end-of-turn token included."""

    prompt: list[int]
    response: list[int]


def read_conversations(source: str | Path) -> list[Conversation]:
    """All conversations of ``source``: a JSONL file, or a hub dataset as "owner/name" or "owner/name:split" ("train" by default).

    A row is {"messages": [...]} (OpenAI's fine-tuning format) or {"prompt", "completion"}, both strings or lists of
    messages (TRL's). Raises ValueError naming file and line of the first one at fault, FileNotFoundError if there is no such file.
    """
    found = [Conversation(where, _messages(row, where), row) for where, row in _rows(source)]
    if not found:
        raise ValueError(f"{source}: no examples")
    return found


def _rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if path.is_file():
        # Not splitlines(): JSON strings may hold characters that it takes for ends of lines.
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}", "utf-8-sig" if number == 1 else "utf-8")
        return
    name, _, split = str(source).partition(":")
    if path.suffix or path.is_absolute() or name.count("/") != 1 or path.is_dir():
        raise FileNotFoundError(f"there is no file {source}, and it is not a hub dataset's id (owner/name or owner/name:split)")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{source}: to read datasets from the hub, run `pip install datasets`; for a local file, check its path") from error
    for number, row in enumerate(load_dataset(name, split=split or "train"), 1):
        yield f"{source} row {number}", row


def _parse(line: bytes, where: str, encoding: str) -> Any:
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: byte {line[error.start]:#04x} at byte {error.start} of the line") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _messages(row: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(row, dict) and "messages" not in row and {"prompt", "completion"} <= row.keys():
        parts = [[{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
                 for key, role in (("prompt", "user"), ("completion", "assistant"))]
        if not all(isinstance(part, list) for part in parts):
            raise ValueError(f"{where}: prompt and completion: expected two strings or two arrays of {{role, content}} objects")
        messages = parts[0] + parts[1]
    else:
        messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise ValueError(f"{where}: messages: expected a JSON array of {{role, content}} objects (or prompt and completion)")
    try:
        _check(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return messages


def _check(messages: list[Any]) -> None:
    """Raise ValueError naming the part at fault of a conversation that cannot be learnt."""
    for i, message in enumerate(messages):
        check_message(message, i)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("messages: no assistant turn to learn from")
    for turn in turns:
        check_messages(messages[:turn])
        if not messages[turn]["content"].strip():
            raise ValueError(f"messages[{turn}].content: the assistant's turn is empty")


def examples(conversations: list[Conversation], prompts: PromptFormat, vocab: int, max_tokens: int) -> tuple[list[Example], int]:
    """Every assistant turn with all before it as its prompt; returns them and how many were left out for being over ``max_tokens`` in all.

    vocab: size of the base's embedding. Raises ValueError naming the conversation whose response alone is over the
    limit, whose prompt the chat template refuses, or whose tokens the base does not have.
    """
    if not prompts.eos_ids:
        raise ValueError("tokeniser: it names no end-of-turn token (eos_token), so no answer could learn to end")
    kept, too_long = [], 0
    for conversation in conversations:
        for turn, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            response = prompts.tokenizer.encode(message["content"], add_special_tokens=False) + prompts.eos_ids[:1]
            try:
                example = Example(prompts.encode(conversation.messages[:turn]), response)
            except ValueError as error:
                raise ValueError(f"{conversation.where}: {error}") from error
            where = f"{conversation.where}: messages[{turn}].content"
            if (highest := max(example.prompt + response)) >= vocab:
                raise ValueError(f"{where}: the tokeniser does not fit the base: it gives token {highest}, the base has {vocab} tokens")
            if len(response) >= max_tokens:
                raise ValueError(f"{where}: the response is {len(response)} tokens with its end, the limit for prompt and response is {max_tokens}")
            if len(example.prompt) + len(response) > max_tokens:
                too_long += 1
            else:
                kept.append(example)
    return kept, too_long
