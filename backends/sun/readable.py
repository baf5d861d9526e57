"""JSON as files have it that people read and git keeps."""

from __future__ import annotations

import msgspec


def readable_json(value: object) -> bytes:
    """A msgspec struct, or what else msgspec encodes, on lines of its own, with a line break at the end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
