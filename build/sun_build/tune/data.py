"""Chat JSONL (OpenAI's fine-tuning format) to training examples, refused by file, line and reason."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sun.text.prompt import PromptFormat, check_messages


@dataclass(frozen=True)
class Example:
    """One assistant turn: the prompt's token ids x1..xn and the response's y1..ym, the end-of-turn token included."""

    prompt: list[int]
    response: list[int]


def read_conversations(path: str | Path) -> list[list[dict]]:
    """Read ``{"messages": [...]}`` lines. Raises ValueError naming file and line of the first one at fault."""
    conversations = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list):
            raise ValueError(f"{where}: messages: expected a JSON array of {{role, content}} objects")
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
        conversations.append(messages)
    if not conversations:
        raise ValueError(f"{path}: no examples")
    return conversations


def examples(conversations: list[list[dict]], prompts: PromptFormat, max_tokens: int) -> tuple[list[Example], int]:
    """Every assistant turn as an example; returns them and how many were left out for being over ``max_tokens`` in all."""
    kept, too_long = [], 0
    for messages in conversations:
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            response = prompts.tokenizer.encode(message["content"], add_special_tokens=False) + prompts.eos_ids[:1]
            example = Example(prompts.encode(messages[:turn]), response)
            if len(example.prompt) + len(response) > max_tokens:
                too_long += 1
            else:
                kept.append(example)
    return kept, too_long


def batches(rows: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled batches, each of rows of about one length (padding costs compute), epoch after epoch."""
    rng = random.Random(seed)
    window = size * 16
    while True:
        order = rng.sample(rows, len(rows))
        epoch = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda e: (len(e.prompt), len(e.response)))
            epoch += [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(epoch)
        yield from (batch for batch in epoch if len(batch) == size or len(rows) < size)
