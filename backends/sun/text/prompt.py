"""From a conversation to prompt token ids: the one place, for tuning, for the router and for the ensembles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant", "tool")


class PromptSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a repository's tasks turn conversations into prompts.

    system_prompt: None leaves a conversation without a system message to the chat template, which may add a default
        of its own; a string (the empty one too) is put in as that conversation's system message.
    """

    system_prompt: str | None = None


class PromptFormat:
    """The base's tokeniser and chat template together with the repository's prompt settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: PromptSettings):
        self.tokenizer = tokenizer
        self.settings = settings

    @classmethod
    def load(cls, base_dir: str | Path, settings: PromptSettings) -> PromptFormat:
        """Load the tokeniser of a base directory (``tokenizer.json`` and its companions); imports no torch."""
        from transformers import PreTrainedTokenizerFast  # takes seconds, and only who tokenises needs it

        return cls(PreTrainedTokenizerFast.from_pretrained(str(base_dir)), settings)

    @property
    def eos_ids(self) -> list[int]:
        """Token ids that end an assistant turn."""
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt text of a conversation, up to and with the header of the assistant's next turn.

        Raises ValueError with the chat template's reason if it refuses the conversation.
        """
        if self.settings.system_prompt is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.settings.system_prompt}, *messages]
        from jinja2 import TemplateError  # transformers imports it here at the latest

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # templates refuse roles and orders of roles that they do not know
            raise ValueError(f"messages: the chat template refuses them: {error}") from error

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Prompt token ids x1..xn of a conversation; a base without a chat template gets the contents joined by newlines."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode("\n".join(m["content"] for m in messages))
        return self.tokenizer.encode(self.render(messages), add_special_tokens=False)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return ``messages`` if it is a conversation that can be prompted, else raise ValueError naming the part at fault."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a non-empty JSON array of {role, content} objects")
    for i, message in enumerate(messages):
        check_message(message, i)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"messages[{len(messages) - 1}].role: the last message must be the user's or a tool's, got {messages[-1]['role']!r}")
    if not any(m["content"].strip() for m in messages if m["role"] != "system"):
        raise ValueError("messages: every content is empty; at least one character is needed")
    return messages


def check_message(message: Any, index: int) -> None:
    """Raise ValueError naming the part at fault of a conversation's message that no prompt can hold."""
    if not isinstance(message, dict):
        raise ValueError(f"messages[{index}]: expected an object with role and content, got {type(message).__name__}")
    if message.get("role") not in ROLES:
        raise ValueError(f"messages[{index}].role: expected one of {', '.join(ROLES)}, got {message.get('role')!r}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"messages[{index}].content: expected a string")
    try:
        message["content"].encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no tokeniser takes
        raise ValueError(f"messages[{index}].content: not valid Unicode: {error.reason} at character {error.start}") from error
