"""Training and test data: chat JSONL, prompt and completion, or a dataset on the hub; refused by file, line and reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sun.text.prompt import PromptFormat, check_messages


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
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON: {error}") from error
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
    turns = [i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "assistant"]
    if not turns:
        raise ValueError(f"{where}: messages: no assistant turn to learn from")
    for turn in turns:
        try:
            check_messages(messages[:turn])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(messages[turn].get("content"), str) or not messages[turn]["content"].strip():
            raise ValueError(f"{where}: messages[{turn}].content: the assistant's turn is empty")
    return messages


def examples(conversations: list[Conversation], prompts: PromptFormat, vocab: int, max_tokens: int) -> tuple[list[Example], int]:
    """Every assistant turn with all before it as its prompt; returns them and how many were left out for being over ``max_tokens`` in all.

    vocab: size of the base's embedding. Raises ValueError naming the conversation whose response alone is over the
    limit, or whose tokens the base does not have.
    """
    if not prompts.eos_ids:
        raise ValueError("tokeniser: it names no end-of-turn token (eos_token), so no answer could learn to end")
    kept, too_long = [], 0
    for conversation in conversations:
        for turn, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            response = prompts.tokenizer.encode(message["content"], add_special_tokens=False) + prompts.eos_ids[:1]
            example = Example(prompts.encode(conversation.messages[:turn]), response)
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
