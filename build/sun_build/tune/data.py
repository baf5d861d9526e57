"""Training and test data: chat JSONL, prompt and completion, or a dataset on the hub; refused by file, line and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sun.text.openai import ROLES, PartError, joined
from sun.text.prompt import PromptFormat, check_message, check_messages

TOOLS = ("tools", "tool_calls", "function_call")
"""Fields of OpenAI's format that no prompt here has room for: without them a model would learn answers for reasons that it never sees."""
NO_TOOLS = "tools are not learnt from fields of their own; write them, and the calls, into the messages' text"

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^:]+))??(:(?P<split>[^:]+))?")
FILE_ENDINGS = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".gz", ".zst")
"""Of a path that is no hub dataset's id, though it looks like one."""


@dataclass(frozen=True)
class Conversation:
    """Messages [{"role", "content"}] with at least one assistant turn to learn, where they were read, and what else the row has."""

    where: str
    messages: list[dict[str, Any]]
    row: dict[str, Any]

    @property
    def turns(self) -> list[int]:
        """Indices of the assistant turns to learn: those of weight 0 are only context."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant" and message.get("weight") != 0]

    @property
    def last_turn(self) -> int:
        """Index of the last of `turns`."""
        return self.turns[-1]


@dataclass(frozen=True)
class Example:
    """One assistant turn: the prompt's token ids x1..xn and the response's y1..ym, the end-of-turn token included."""

    prompt: list[int]
    response: list[int]


def read_conversations(source: str | Path) -> list[Conversation]:
    """All conversations of ``source``: a JSONL file, or a hub dataset as "owner/name", "owner/name:split" ("train" by default) or "owner/name:config:split".

    A row is {"messages": [...]} (OpenAI's fine-tuning format, less its tools; a content may be a list of text parts) or {"prompt", "completion"}, both strings or lists of
    messages (TRL's). Raises ValueError naming file and line of the first one at fault, FileNotFoundError if there is no such file.
    """
    found = [_conversation(row, where) for where, row in _rows(source)]
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
    named = HUB_ID.fullmatch(str(source))
    if named is None or Path(named["name"]).suffix in FILE_ENDINGS or path.is_dir():
        raise FileNotFoundError(f"there is no file {source}, and it is not a hub dataset's id (owner/name, owner/name:split or owner/name:config:split)")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{source}: to read datasets from the hub, run `pip install datasets`; for a local file, check its path") from error
    which = [part for part in (named["name"], named["config"]) if part]
    for number, row in enumerate(load_dataset(*which, split=named["split"] or "train"), 1):
        yield f"{source} row {number}", row


def _parse(line: bytes, where: str, encoding: str) -> Any:
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: byte {line[error.start]:#04x} at byte {error.start} of the line") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: brackets are nested too deeply") from error


def _conversation(row: Any, where: str) -> Conversation:
    if isinstance(row, dict) and row.get("messages") is None and {"prompt", "completion"} <= row.keys():
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
        made = Conversation(where, [_plain(message, i) for i, message in enumerate(messages)], row)
        _check(made)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return made


def _plain(message: Any, index: int) -> Any:
    """A message with its role and content as prompts have them."""
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    try:
        return {**message, "role": ROLES.get(role, role) if isinstance(role, str) else role, "content": joined(message.get("content"))}
    except PartError as error:
        raise ValueError(f"messages[{index}].content{error}") from error


def _check(conversation: Conversation) -> None:
    """Raise ValueError naming the part at fault of a conversation that cannot be learnt, or not as a whole."""
    messages, row = conversation.messages, conversation.row
    _check_tools(row, "")
    if row.get("functions") and "possible" not in row:  # with it they are BFCL's, for its metric; the messages have them too
        raise ValueError(f"functions: {NO_TOOLS}")
    for i, message in enumerate(messages):
        _check_tools(message, f"messages[{i}].")
        check_message(message, i)
        if message["role"] == "assistant" and message.get("weight") not in (None, 0, 1):
            raise ValueError(f"messages[{i}].weight: got {message['weight']!r}, expected 0 (context only) or 1 (learnt)")
    if not conversation.turns:
        raise ValueError("messages: no assistant turn to learn from" + (": all have weight 0" if any(m["role"] == "assistant" for m in messages) else ""))
    for turn in conversation.turns:
        before = messages[turn - 1]["role"] if turn else None
        if before not in ("user", "tool"):
            raise ValueError(f"messages[{turn}]: an assistant turn to learn answers a user, this one comes {f'after {before!r}' if turn else 'first'}; "
                             "with weight 0 it is context only")
        check_messages(messages[:turn])
        if not messages[turn]["content"].strip():
            raise ValueError(f"messages[{turn}].content: the assistant's turn is empty")


def _check_tools(part: Any, where: str) -> None:
    for field in TOOLS:
        if isinstance(part, dict) and part.get(field):
            raise ValueError(f"{where}{field}: {NO_TOOLS}")


def examples(conversations: list[Conversation], prompts: PromptFormat, vocab: int, max_tokens: int) -> tuple[list[Example], int]:
    """Every turn to learn with all before it as its prompt; returns them and how many were left out for being over ``max_tokens`` in all.

    vocab: size of the base's embedding. Raises ValueError naming the conversation whose response alone is over the
    limit, whose prompt the chat template refuses, or whose tokens the base does not have.
    """
    if not prompts.eos_ids:
        raise ValueError("tokeniser: it names no end-of-turn token (eos_token), so no answer could learn to end")
    kept, too_long = [], 0
    for conversation in conversations:
        for turn in conversation.turns:
            response = prompts.tokenizer.encode(conversation.messages[turn]["content"], add_special_tokens=False) + prompts.eos_ids[:1]
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
