"""What OpenAI's messages may have in place of a role and a text: lists of text parts, and a role that chat templates have under another name."""

from __future__ import annotations

from typing import Any

ROLES = {"developer": "system"}
"""OpenAI's names of roles that chat templates have under another."""


class PartError(ValueError):
    """A part that is no text. field: which ("[2].type"); reason: what was expected."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


def joined(content: Any) -> Any:
    """A list of text parts as one text, a line each or more; anything else is as it is. Raises PartError."""
    return "\n".join(_text(part, f"[{i}]") for i, part in enumerate(content)) if isinstance(content, list) else content


def _text(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise PartError(where, "expected an object with type and text")
    if part.get("type") != "text":
        raise PartError(f"{where}.type", f"only parts of type 'text' are supported here, got {str(part.get('type'))[:64]!r}")
    if not isinstance(part.get("text"), str):
        raise PartError(f"{where}.text", "expected a text")
    return part["text"]
